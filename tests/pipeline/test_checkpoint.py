"""Checkpoints: the same arrays come back, every damaged byte is found, an older one takes over, indexes hold."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import weakref
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save, save_file

from pipeline import checkpoint as k
from pipeline import run_dir
from pipeline.errors import PipelineError
from pipeline.run_dir import RunDir, move_aside, read_json, write_sealed
from pipeline.settings import remedy_of_config


def arrays(seed: int = 0) -> k.Arrays:
    random = np.random.default_rng(seed)
    return {
        "conv1.w": random.standard_normal((3, 3, 2, 5), dtype=np.float32),
        "conv1.b": np.array([np.pi, -0.0, np.inf, np.nan, 1e-42], dtype=np.float32),
        "momentum/conv1.w": random.standard_normal((3, 3, 2, 5), dtype=np.float32),
        "mean": np.arange(7, dtype=np.float32).reshape(1, 7, 1),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "train"


def test_round_trip_is_exact(folder: Path) -> None:
    path = k.save_checkpoint(folder, 12, {"a": [1, None, "ü"], "x": 0.1}, arrays())
    assert path.name == "step-00000012.ckpt"
    loaded = k.load_checkpoint(path)
    assert loaded.header == {"a": [1, None, "ü"], "x": 0.1, "step": 12}
    assert loaded.arrays.keys() == arrays().keys()
    for name, array in arrays().items():
        assert loaded.arrays[name].dtype == array.dtype
        assert loaded.arrays[name].shape == array.shape
        assert loaded.arrays[name].tobytes() == array.tobytes()
    assert k.find_checkpoint(folder, "latest") == path
    assert sorted(p.name for p in folder.iterdir()) == ["latest.json", path.name]


def test_bytes_depend_on_the_contents_alone(folder: Path, tmp_path: Path) -> None:
    one = k.save_checkpoint(folder, 1, {"a": 1, "b": 2}, arrays())
    reordered = dict(sorted(arrays().items(), reverse=True))
    for _ in range(8):  # hash tables may have another order each time
        other = k.save_checkpoint(tmp_path / "other", 1, {"b": 2, "a": 1}, reordered)
        assert one.read_bytes() == other.read_bytes()


def test_the_file_is_what_safetensors_would_have_written(folder: Path) -> None:
    path = k.save_checkpoint(folder, 1, {"a": "ü"}, arrays())
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    assert path.read_bytes() == save(arrays(), metadata)


def test_arrays_are_fetched_one_at_a_time(folder: Path) -> None:
    alive: list[weakref.ref[np.ndarray]] = []

    def to_host(name: str, array: np.ndarray) -> np.ndarray:
        assert all(reference() is None for reference in alive), f"an array is still held when {name} is asked for"
        copy = array.copy()
        alive.append(weakref.ref(copy))
        return copy

    path = k.save_checkpoint(folder, 1, {}, arrays(), to_host)
    assert len(alive) == len(arrays())
    assert k.load_checkpoint(path).arrays["conv1.w"].tobytes() == arrays()["conv1.w"].tobytes()


def test_an_array_that_cannot_be_fetched_leaves_nothing(folder: Path) -> None:
    def to_host(name: str, array: np.ndarray) -> np.ndarray:
        raise PipelineError(f"{name} is not finite")

    with pytest.raises(PipelineError, match="is not finite"):
        k.save_checkpoint(folder, 1, {}, arrays(), to_host)
    assert not list(folder.iterdir())


def test_a_checkpoint_that_the_disk_cannot_read_is_passed_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad sector under a memory map kills the process; so a file is read before it is mapped."""
    old, new = (k.save_checkpoint(folder, step, {}, arrays()) for step in (1, 2))
    events: list[str] = []

    def read_through(path: Path) -> None:
        events.append(f"read {path.name}")
        if path == new:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(k, "_read_through", read_through)
    monkeypatch.setattr(k, "safe_open", lambda path, **how: events.append(f"map {path.name}") or safe_open(path, **how))
    found, complaints = k.newest_sound(folder)
    assert found is not None
    assert found.path == old
    assert events == [f"read {new.name}", f"read {old.name}", f"map {old.name}"]
    assert complaints == [f"cannot read the checkpoint {new}: Input/output error; an older checkpoint is tried instead"]


def test_every_cut_is_refused_by_name(folder: Path) -> None:
    path = k.save_checkpoint(folder, 1, {}, arrays())
    whole = path.read_bytes()
    for length in [*range(64), *range(64, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(PipelineError, match=r"step-00000001\.ckpt .*; choose another with --checkpoint"):
            k.load_checkpoint(path)


def test_every_flipped_bit_is_refused_or_harmless(folder: Path) -> None:
    path = k.save_checkpoint(folder, 1, {"lr": 0.01}, arrays())
    whole = bytearray(path.read_bytes())
    refused = 0
    for place in np.random.default_rng(1).permutation(len(whole) * 8)[:1000].tolist():
        byte, bit = divmod(place, 8)
        whole[byte] ^= 1 << bit
        path.write_bytes(whole)
        whole[byte] ^= 1 << bit
        try:
            loaded = k.load_checkpoint(path)
        except PipelineError as error:
            refused += str(path) in str(error)
            continue
        assert loaded.header == {"lr": 0.01, "step": 1}
        assert {n: a.tobytes() for n, a in loaded.arrays.items()} == {n: a.tobytes() for n, a in arrays().items()}
    assert refused > 960


def test_appended_bytes_are_refused(folder: Path) -> None:
    path = k.save_checkpoint(folder, 1, {}, arrays())
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(PipelineError, match="damaged"):
        k.load_checkpoint(path)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(struct.pack("<Q", 2**50) + b"{}", id="a header of a petabyte"),
        pytest.param(struct.pack("<Q", 2**64 - 1) + b"{}", id="a header of 16 exabytes"),
        pytest.param(
            (lambda t: struct.pack("<Q", len(t)) + t)(
                json.dumps({"w": {"dtype": "F32", "shape": [2**40, 2**10], "data_offsets": [0, 2**52]}}).encode()
            ),
            id="an array of four petabytes",
        ),
        pytest.param(
            (lambda t: struct.pack("<Q", len(t)) + t)(
                json.dumps({"w": {"dtype": "F32", "shape": [2**63, 4], "data_offsets": [0, 0]}}).encode()
            ),
            id="a shape that overflows",
        ),
        pytest.param(b"", id="empty"),
        pytest.param(b"\x80\x04\x95", id="a pickle"),
    ],
)
def test_hostile_files_are_refused_without_allocating(folder: Path, content: bytes) -> None:
    folder.mkdir()
    path = folder / "step-00000001.ckpt"
    path.write_bytes(content)
    with pytest.raises(PipelineError, match=r"step-00000001\.ckpt is damaged or no checkpoint of this program"):
        k.load_checkpoint(path)


@pytest.mark.parametrize(
    "text",
    [
        *("[]", "1", "{}", "{", "[" * 50_000, '{"step": 1}'),
        *(f'{{"step": {step}, "sha256": ""}}' for step in ('"1"', "-1", "true", "null", "1.0")),
        '{"step": 1, "x": NaN, "sha256": ""}',
    ],
)
def test_headers_of_other_programs_are_refused(folder: Path, text: str) -> None:
    folder.mkdir()
    path = folder / "step-00000001.ckpt"
    save_file(arrays(), path, {"header": text})
    with pytest.raises(
        PipelineError, match=r"step-00000001\.ckpt is damaged or no checkpoint of this program: its header"
    ):
        k.load_checkpoint(path)


@pytest.mark.parametrize("kind", [np.float64, np.float16, np.uint8, np.bool_])
def test_other_types_than_float32_are_refused(folder: Path, kind: type) -> None:
    odd = {"a": np.zeros(2, np.float32), "w": np.zeros(3, kind)}
    with pytest.raises(ValueError, match="float32 arrays only, and w is"):
        k.save_checkpoint(folder, 1, {}, odd)
    assert not list(folder.iterdir())
    path = folder / "step-00000001.ckpt"
    save_file(odd, path, {"header": k._canonical({"step": 1, "sha256": k._digest({"step": 1}, odd)})})
    with pytest.raises(PipelineError, match=r"step-00000001\.ckpt is no checkpoint of this program: w is not float32"):
        k.load_checkpoint(path)


def test_missing_file_and_folder_are_named(folder: Path) -> None:
    with pytest.raises(PipelineError, match=r"there is no checkpoint .*none\.ckpt"):
        k.load_checkpoint(folder / "none.ckpt")
    folder.mkdir()
    with pytest.raises(PipelineError, match=r"cannot read the checkpoint .*train"):
        k.load_checkpoint(folder)


def test_a_bare_name_is_a_file_here_and_the_one_of_the_run_is_pointed_at(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Messages and eval's metrics.json name checkpoints without their folder."""
    path = k.save_checkpoint(folder, 1, {}, {"w": np.zeros(3, np.float32)})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PipelineError, match=rf"no checkpoint {path.name} in this folder; did you mean {path}\?"):
        k.find_checkpoint(folder, path.name)
    assert k.find_checkpoint(folder, "none.ckpt") == Path("none.ckpt")
    shutil.copy(path, tmp_path)
    assert k.find_checkpoint(folder, path.name) == Path(path.name)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=200)
    | st.builds(
        lambda text, tail: struct.pack("<Q", len(text.encode())) + text.encode() + tail,
        st.recursive(
            st.none() | st.integers() | st.text(max_size=5) | st.sampled_from(["F32", "BF16", "U8", "F8_E4M3"]),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from(["__metadata__", "w", "dtype", "shape", "data_offsets"]), inner)
            ),
            max_leaves=10,
        ).map(json.dumps),
        st.binary(max_size=16),
    )
)
def test_any_file_is_refused_plainly(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "step-00000001.ckpt"
    path.write_bytes(content)
    with pytest.raises(PipelineError, match="damaged"):
        k.load_checkpoint(path)


def test_an_older_sound_checkpoint_takes_over(folder: Path) -> None:
    paths = [k.save_checkpoint(folder, step, {}, arrays(step)) for step in (1, 2, 3)]
    assert k.newest_sound(folder)[0].path == paths[2]
    paths[2].write_bytes(paths[2].read_bytes()[:-5])
    damaged = bytearray(paths[1].read_bytes())
    damaged[-1] ^= 1
    paths[1].write_bytes(damaged)
    saved, complaints = k.newest_sound(folder)
    assert saved is not None
    assert saved.path == paths[0]
    assert saved.arrays["conv1.w"].tobytes() == arrays(1)["conv1.w"].tobytes()
    assert ["step-00000003" in complaints[0], "step-00000002" in complaints[1]] == [True, True]
    assert all("an older checkpoint is tried instead" in complaint for complaint in complaints)
    paths[0].write_bytes(b"")
    assert k.newest_sound(folder)[0] is None
    assert len(k.newest_sound(folder)[1]) == 3


def test_newest_is_by_number_not_by_name_or_time(folder: Path) -> None:
    for step in (100_000_000, 5, 99_999_999):
        k.save_checkpoint(folder, step, {}, {"w": np.zeros(1, np.float32)})
    (folder / "step-1.ckpt").write_bytes(b"")
    (folder / "step-00000009.ckpt.tmp").write_bytes(b"")
    assert [k.step_of(p) for p in k.checkpoints(folder)] == [5, 99_999_999, 100_000_000]


def test_best_is_kept_ties_go_to_the_earlier_and_later_steps_are_void(folder: Path) -> None:
    def note(step: int, top1: float) -> int:
        k.note_best(folder, k.save_checkpoint(folder, step, {}, arrays()), step, top1)
        best = k.best_of(folder)
        assert best is not None
        return best["step"]

    assert k.best_of(folder) is None
    assert note(1, 0.5) == 1
    assert note(2, 0.5) == 1
    assert note(3, 0.7) == 3
    assert note(4, 0.6) == 3
    # Taken up again from step 1: what was best at step 3 has not happened yet.
    assert note(2, 0.6) == 2
    assert k.find_checkpoint(folder, "best") == folder / "step-00000002.ckpt"
    # And from there once more, on a device that rounds differently.
    assert note(1, 0.4) == 1
    assert note(1, 0.3) == 1
    assert note(2, 0.35) == 2


def test_prune_keeps_the_newest_and_the_best_and_clears_temporaries(folder: Path) -> None:
    for step in range(1, 7):
        path = k.save_checkpoint(folder, step, {}, arrays())
        if step == 2:
            k.note_best(folder, path, step, 0.9)
    (folder / "step-00000007.ckpt.tmp").write_bytes(b"half")
    k.prune(folder, 2, folder / "step-00000006.ckpt")
    assert [k.step_of(p) for p in k.checkpoints(folder)] == [2, 5, 6]
    assert not list(folder.glob("*.tmp"))
    k.prune(folder, 10, folder / "step-00000006.ckpt")
    assert len(k.checkpoints(folder)) == 3


def test_prune_never_takes_damaged_later_ones_for_the_newest(folder: Path) -> None:
    for step in (4, 6, 8, 10, 12):
        path = k.save_checkpoint(folder, step, {}, arrays())
        if step > 8:
            path.write_bytes(b"damaged")
    k.prune(folder, 1, folder / "step-00000008.ckpt")
    assert [k.step_of(p) for p in k.checkpoints(folder)] == [8, 10, 12]
    saved, complaints = k.newest_sound(folder)
    assert saved is not None
    assert (saved.header["step"], len(complaints)) == (8, 2)


def test_find_checkpoint_says_what_to_do(folder: Path) -> None:
    with pytest.raises(PipelineError, match=rf"no checkpoint in {folder}; train first: .*--run {folder.parent}"):
        k.find_checkpoint(folder, "latest")
    k.save_checkpoint(folder, 1, {}, arrays())
    with pytest.raises(
        PipelineError,
        match=rf"best\.json does not exist: no epoch has been validated, or .*--resume --run {folder.parent} writes it "
        "anew; name a checkpoint file with --checkpoint PATH instead$",
    ):
        k.find_checkpoint(folder, "best")
    assert k.find_checkpoint(folder, "some/file.ckpt") == Path("some/file.ckpt")


@pytest.mark.parametrize(
    "entry",
    [
        {"checkpoint": "../../etc/passwd", "step": 1},
        {"checkpoint": "step-00000001.ckpt", "step": 2},
        {"checkpoint": "step-00000001.ckpt"},
        {"checkpoint": 1, "step": 1},
        {},
    ],
)
def test_index_that_names_no_checkpoint_is_refused(folder: Path, entry: dict) -> None:
    k.save_checkpoint(folder, 1, {}, arrays())
    for which in ("latest", "best"):
        write_sealed(folder / f"{which}.json", entry)
        with pytest.raises(PipelineError, match=rf"{which}\.json names no checkpoint; name a checkpoint file") as told:
            k.find_checkpoint(folder, which)
        assert ("or remove it, and the newest sound one is taken" in str(told.value)) == (which == "latest")


def test_without_an_index_the_newest_sound_checkpoint_is_chosen_and_told(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As for --resume; --stage verify has nothing to say of such a run either."""
    with pytest.raises(PipelineError, match=f"no checkpoint in {folder}; train first"):
        k.chosen_checkpoint(folder, "latest")
    paths = [k.save_checkpoint(folder, step, {}, arrays(step)) for step in (1, 2, 3)]
    k.note_latest(folder, paths[1])
    assert k.chosen_checkpoint(folder, "latest").path == paths[1]
    (folder / "latest.json").unlink()
    assert k.chosen_checkpoint(folder, str(paths[0])).path == paths[0]
    assert capsys.readouterr() == ("", "")
    assert k.chosen_checkpoint(folder, "latest").path == paths[2]
    told = f"{folder}/latest.json is missing: the newest sound checkpoint is"
    assert capsys.readouterr() == ("", f"{told} {paths[2]}\n")
    paths[2].write_bytes(paths[2].read_bytes()[:-1])
    assert k.chosen_checkpoint(folder, "latest").path == paths[1]
    warning, last = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: the checkpoint {paths[2]} is damaged")
    assert last == f"{told} {paths[1]}"
    for path in paths:
        path.write_bytes(b"damaged")
    with pytest.raises(
        PipelineError, match=f"no checkpoint in {folder} can be read; .*--restart --run {folder.parent}"
    ):
        k.chosen_checkpoint(folder, "latest")
    assert capsys.readouterr().err.count("warning: ") == 3


def test_every_flipped_bit_of_an_index_is_refused_or_harmless(folder: Path) -> None:
    path = k.save_checkpoint(folder, 1, {}, arrays())
    k.note_best(folder, path, 1, 0.25)
    index = folder / "best.json"
    before, whole = k.best_of(folder), bytearray(index.read_bytes())
    refused = 0
    for byte in range(len(whole)):
        for bit in (byte % 8, 5):
            whole[byte] ^= 1 << bit
            index.write_bytes(whole)
            whole[byte] ^= 1 << bit
            try:
                assert k.best_of(folder) == before
            except PipelineError as error:
                refused += str(index) in str(error)
    assert refused > 0.8 * 2 * len(whole)


def test_move_aside_takes_the_first_free_name(folder: Path) -> None:
    for number in (1, 2):
        k.save_checkpoint(folder, number, {}, arrays())
        assert move_aside(folder) == folder.with_name(f"train.old-{number}")
        assert not folder.exists()
    assert [k.step_of(k.checkpoints(folder.with_name(f"train.old-{n}"))[0]) for n in (1, 2)] == [1, 2]


def test_arrays_of_another_shape_are_refused(folder: Path) -> None:
    """The same bytes read in another way are other weights."""
    path = k.save_checkpoint(folder, 1, {}, arrays())
    data = path.read_bytes()
    assert data.count(b"[3,3,2,5]") == 2
    path.write_bytes(data.replace(b"[3,3,2,5]", b"[3,3,5,2]"))
    with pytest.raises(PipelineError, match="do not match its checksum"):
        k.load_checkpoint(path)


def test_a_lost_configuration_is_that_of_a_checkpoint_where_there_is_one(folder: Path) -> None:
    run = RunDir(folder.parent)
    assert "name the recipe with --recipe" in remedy_of_config(run)
    k.save_checkpoint(folder, 1, {}, arrays())
    assert "newest checkpoint" in remedy_of_config(run)


def test_the_step_is_the_files_own(folder: Path) -> None:
    """Whatever step the header given has, as one read from an older checkpoint."""
    assert k.load_checkpoint(k.save_checkpoint(folder, 7, {"step": 3}, arrays())).header["step"] == 7


def test_what_was_moved_aside_stays_there_without_power(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    k.save_checkpoint(folder, 1, {}, arrays())
    flushed = []
    monkeypatch.setattr(run_dir, "sync_folder", flushed.append)
    move_aside(folder)
    assert flushed == [folder.parent]


def test_latest_follows_the_newest_saved(folder: Path) -> None:
    k.save_checkpoint(folder, 4, {}, arrays())
    k.save_checkpoint(folder, 8, {}, arrays())
    assert read_json(folder / "latest.json", "")["step"] == 8
    k.note_latest(folder, folder / "step-00000004.ckpt")
    assert k.find_checkpoint(folder, "latest").name == "step-00000004.ckpt"


def test_a_lost_index_of_the_best_is_made_from_the_checkpoints(folder: Path) -> None:
    """Else the next pruning would take the best checkpoint for one that nobody wants."""
    scores = {1: 0.2, 2: 0.6, 3: None, 4: 0.6, 5: 0.4, 9: 0.9}
    for step, top1 in scores.items():
        k.save_checkpoint(folder, step, {"validation": None if top1 is None else {"top1": top1}}, arrays())
    k.checkpoints(folder)[0].write_bytes(b"damaged")
    k.restore_best(folder, k.checkpoints(folder)[4])  # step 9 lies behind the newest sound one
    assert k.best_of(folder) == {"checkpoint": "step-00000002.ckpt", "step": 2, "top1": 0.6}
    write_sealed(folder / "best.json", {"checkpoint": "step-00000005.ckpt", "step": 5, "top1": 0.4})
    k.restore_best(folder, k.checkpoints(folder)[4])  # what is there stays
    assert k.best_of(folder)["step"] == 5


def test_an_index_of_the_best_whose_checkpoint_is_gone_is_made_anew(folder: Path) -> None:
    """Verification has a damaged checkpoint removed; what goes on then must leave nothing that it would name again."""
    for step, top1 in {1: 0.5, 2: 0.3}.items():
        k.save_checkpoint(folder, step, {"validation": {"top1": top1}}, arrays())
    write_sealed(folder / "best.json", {"checkpoint": "step-00000001.ckpt", "step": 1, "top1": 0.5})
    k.checkpoints(folder)[0].unlink()
    k.restore_best(folder, k.checkpoints(folder)[-1])
    assert k.best_of(folder) == {"checkpoint": "step-00000002.ckpt", "step": 2, "top1": 0.3}
    k.checkpoints(folder)[0].unlink()
    newest = k.save_checkpoint(folder, 3, {"validation": None}, arrays())
    k.restore_best(folder, newest)  # no other has been validated
    assert k.best_of(folder) is None
