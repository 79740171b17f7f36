"""SoftLSH: construction, checks, files, identity."""

import contextlib
import pickle

import numpy as np
import pytest

import racecore
from racecore.errors import CorruptFileError


def test_random_is_reproducible_and_shaped():
    first = racecore.SoftLSH.random(head_dim=20, n_tables=3, n_planes=2, beta=1.5, rng=7)
    again = racecore.SoftLSH.random(20, 3, 2, 1.5, np.random.default_rng(7))
    assert first.planes.shape == (3, 2, 20)
    assert (first.n_tables, first.n_planes, first.n_buckets, first.head_dim, first.beta) == (
        3,
        2,
        4,
        20,
        1.5,
    )
    assert first == again
    assert first.fingerprint == again.fingerprint
    assert first != racecore.SoftLSH.random(20, 3, 2, 1.5, rng=8)
    assert first.n_heads is None


def test_random_planes_are_exact_in_float32_and_standard_normal():
    planes = racecore.SoftLSH.random(64, 50, 10, rng=0).planes
    assert planes.dtype == np.float64
    np.testing.assert_array_equal(planes, planes.astype(np.float32))
    assert abs(planes.mean()) < 0.02
    assert abs(planes.std() - 1) < 0.02


def test_per_head_planes_differ_between_heads():
    lsh = racecore.SoftLSH.random(8, 2, 2, beta=[1.0, 2.0, 3.0], rng=0, n_heads=3)
    assert lsh.planes.shape == (3, 2, 2, 8)
    assert lsh.n_heads == 3
    assert not np.array_equal(lsh.planes[0], lsh.planes[1])
    np.testing.assert_array_equal(lsh.beta, [1, 2, 3])
    assert racecore.SoftLSH(lsh.planes[0], [1.0, 2.0]).n_heads == 2


@pytest.mark.parametrize("dim", [5, 24, 40])
def test_orthogonal_planes_are_orthogonal_in_blocks(dim):
    rows = racecore.SoftLSH.random(dim, 6, 4, rng=1, orthogonal=True).planes.reshape(24, dim)
    for start in range(0, 24, dim):
        gram = rows[start : start + dim] @ rows[start : start + dim].T
        np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-5)
    lengths = np.linalg.norm(
        racecore.SoftLSH.random(dim, 500, 4, rng=1, orthogonal=True).planes, axis=-1
    )
    assert abs((lengths**2).mean() / dim - 1) < 0.1


def test_orthogonal_planes_estimate_the_kernel_better():
    """At many tables, orthogonal planes lower the mean error of the angular kernel over draws."""
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 40, 32))
    cosine = (q / np.linalg.norm(q, axis=1)[:, None]) @ (k / np.linalg.norm(k, axis=1)[:, None]).T
    exact = 1 - np.arccos(cosine) / np.pi
    errors = []
    for orthogonal in (False, True):
        squares = []
        for seed in range(40):
            rows = racecore.SoftLSH.random(32, 32, 1, rng=seed, orthogonal=orthogonal).planes[:, 0]
            estimate = (((q @ rows.T) > 0)[:, None] == ((k @ rows.T) > 0)[None]).mean(axis=-1)
            squares.append(((estimate - exact) ** 2).mean())
        errors.append(np.sqrt(np.mean(squares)))
    assert errors[1] < 0.97 * errors[0]


def test_instances_are_immutable_copies():
    planes = np.ones((1, 1, 3))
    lsh = racecore.SoftLSH(planes, 1.0)
    planes[:] = 2
    assert lsh.planes.max() == 1
    with pytest.raises(ValueError, match="read-only"):
        lsh.planes[0] = 5
    with pytest.raises(AttributeError):
        lsh.beta = 3


@pytest.mark.parametrize(
    ("planes", "beta", "error", "message"),
    [
        (np.ones((2, 3)), 1.0, ValueError, r"\[L, P, D\] or \[H, L, P, D\].*\(2, 3\)"),
        (np.ones((2, 0, 3)), 1.0, ValueError, "no empty axis"),
        (np.ones((1, 17, 3)), 1.0, ValueError, "at most 16 planes.*P = 17"),
        (np.full((1, 1, 2), np.nan), 1.0, ValueError, r"finite, got nan at index \(0, 0, 0\)"),
        (np.ones((1, 1, 2)), np.inf, ValueError, "beta must be finite"),
        (np.ones((1, 1, 2)), 1e300, ValueError, "beta must be finite and at most"),
        (
            np.ones((1, 1, 2)),
            np.ones((2, 2)),
            ValueError,
            r"beta must be a number or have shape \[H\]",
        ),
        (np.ones((3, 1, 1, 2)), np.ones(2), ValueError, "beta has 2 heads and planes have 3"),
        (np.ones((1, 1, 2)), "sharp", TypeError, "beta must be a real number"),
        (np.ones((1, 1, 2), complex), 1.0, TypeError, "planes must be real numbers"),
    ],
)
def test_bad_values_are_named(planes, beta, error, message):
    with pytest.raises(error, match=message):
        racecore.SoftLSH(planes, beta)


@pytest.mark.parametrize("name", ["head_dim", "n_tables", "n_planes", "n_heads"])
@pytest.mark.parametrize("value", [0, -1, 2.5, True])
def test_random_refuses_sizes_that_are_not_positive_integers(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a positive integer"):
        racecore.SoftLSH.random(**{"head_dim": 4, name: value})


@pytest.mark.parametrize("n_heads", [None, 2])
def test_save_load_and_pickle_keep_everything(tmp_path, n_heads):
    lsh = racecore.SoftLSH.random(
        6, 2, 3, beta=0.7 if n_heads is None else [0.7, 2.0], rng=3, n_heads=n_heads
    )
    lsh.save(tmp_path / "lsh.npz")
    for copy in (racecore.SoftLSH.load(tmp_path / "lsh.npz"), pickle.loads(pickle.dumps(lsh))):
        assert copy == lsh
        np.testing.assert_array_equal(copy.planes, lsh.planes)
        np.testing.assert_array_equal(copy.beta, lsh.beta)
    assert list(tmp_path.iterdir()) == [tmp_path / "lsh.npz"]


def test_damaged_or_foreign_files_are_refused(tmp_path):
    path = tmp_path / "lsh.npz"
    racecore.SoftLSH.random(6, 2, 3, rng=3).save(path)
    content = path.read_bytes()
    path.write_bytes(content[:-30])
    with pytest.raises(CorruptFileError, match="damaged"):
        racecore.SoftLSH.load(path)
    position = content.index(b"planes.npy") + 200
    path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
    with pytest.raises(CorruptFileError):
        racecore.SoftLSH.load(path)
    np.savez(path, planes=np.ones((1, 1, 1)))
    with pytest.raises(CorruptFileError, match="not a racecore.SoftLSH file"):
        racecore.SoftLSH.load(path)
    path.write_text("hello")
    with pytest.raises(CorruptFileError):
        racecore.SoftLSH.load(path)
    np.save(tmp_path / "array.npy", np.ones(3))
    with pytest.raises(CorruptFileError, match="plain array"):
        racecore.SoftLSH.load(tmp_path / "array.npy")
    with pytest.raises(FileNotFoundError):
        racecore.SoftLSH.load(tmp_path / "absent.npz")
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere to write lsh.npz to"):
        racecore.SoftLSH.random(3).save(tmp_path / "nowhere" / "lsh.npz")


def test_every_flipped_bit_at_the_end_is_refused_or_harmless(tmp_path):
    lsh = racecore.SoftLSH.random(6, 2, 3, rng=3)
    path = tmp_path / "lsh.npz"
    lsh.save(path)
    content = path.read_bytes()
    for position in range(len(content) - 350, len(content)):
        for bit in (0, 3, 6):
            flipped = bytearray(content)
            flipped[position] ^= 1 << bit
            path.write_bytes(flipped)
            with contextlib.suppress(CorruptFileError):
                assert racecore.SoftLSH.load(path) == lsh


def test_saving_through_a_link_keeps_the_link(tmp_path):
    link = tmp_path / "link.npz"
    link.symlink_to(tmp_path / "target.npz")
    racecore.SoftLSH.random(6, rng=3).save(link)
    assert link.is_symlink()
    assert racecore.SoftLSH.load(tmp_path / "target.npz") == racecore.SoftLSH.random(6, rng=3)


def test_files_of_a_newer_version_are_refused(tmp_path):
    from racecore.runtime import files

    files.save(
        tmp_path / "new.npz", "racecore.SoftLSH", 99, planes=np.ones((1, 1, 1)), beta=np.ones(())
    )
    with pytest.raises(CorruptFileError, match="version 99.*upgrade"):
        racecore.SoftLSH.load(tmp_path / "new.npz")


def test_a_failed_save_leaves_the_old_file(tmp_path):
    from racecore.runtime import files

    path = tmp_path / "lsh.npz"
    lsh = racecore.SoftLSH.random(6, rng=3)
    lsh.save(path)
    with pytest.raises(RuntimeError, match="power cut"), files.replace_when_done(path) as partial:
        with open(partial, "wb") as file:
            file.write(b"half")
        raise RuntimeError("power cut")
    assert racecore.SoftLSH.load(path) == lsh
    assert list(tmp_path.iterdir()) == [path]
