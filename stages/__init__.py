"""One file a stage, each with a function ``run``; ``docs/design.md`` says what the files hold that several share."""
