"""Mutation tests of the kernels: python tests/cuda_on_cpu/mutations.py

Each mutation removes a barrier, removes a check of a bound, or changes a term of a formula. The
program prints the watcher that failed, or UNSEEN, and exits with the number of unseen mutations. It
takes half an hour; test_cuda_kernels.py tries a few of them.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import racecore
from cuda_on_cpu.mutations_of_socket import SOCKET_BOUNDS, SOCKET_TERMS
from cuda_on_cpu.watched import failure

__all__ = ["Mutation", "barriers", "changes", "noticed_by"]

_OPS = Path(racecore.__file__).parent / "ops"
_BARRIER = "__syncthreads();"
_LIMIT = 280.0  # seconds: a changed kernel may never end, which is noticed


class Mutation(NamedTuple):
    """One change of one file: replace the text `old` at `start` by `new`."""

    file: str
    start: int
    old: str
    new: str
    watchers: tuple[str, ...]

    def __str__(self) -> str:
        text = (_OPS / self.file).read_text()
        line = text.count("\n", 0, self.start) + 1
        return f"{self.file}:{line}: {self.old} -> {self.new or 'nothing'}"


def barriers() -> Iterator[Mutation]:
    """Yield the removal of every barrier."""
    for path in sorted(_OPS.rglob("*.cu*")):
        for match in re.finditer(re.escape(_BARRIER), path.read_text()):
            line = path.read_text()[: match.start()].rpartition("\n")[2]
            # attention does not launch the kernels of soft_hash/kernels.cu
            if "//" not in line and "soft_hash/kernels" not in str(path):
                yield Mutation(
                    str(path.relative_to(_OPS)), match.start(), _BARRIER, "", ("thread", "results")
                )


_BOUNDS = (
    (
        "cuda/warp.cuh",
        "if (!(rows.group.kept >> i & 1) || column >= rows.width) return;",
        "if (column >= rows.width) return;",
    ),
    (
        "cuda/warp.cuh",
        "if (!(rows.group.kept >> i & 1) || column >= rows.width) return;",
        "if (!(rows.group.kept >> i & 1)) return;",
    ),
    ("cuda/warp.cuh", "if (column + c < rows.width) x[c]", "x[c]"),
    (
        "cuda/warp.cuh",
        "if (i >= rows.group.n || column >= rows.width) return;",
        "if (i >= rows.group.n) return;",
    ),
    (
        "cuda/warp.cuh",
        "if (i >= rows.group.n || column >= rows.width) return;",
        "if (column >= rows.width) return;",
    ),
    ("cuda/warp.cuh", "if (column + c >= rows.width) continue;", ""),
    ("cuda/call.cuh", "task.end - t < TOKENS ? task.end - t : TOKENS", "TOKENS"),
    ("cuda/readout.cuh", "s < buckets && d < width ? (Real)from", "true ? (Real)from"),
    ("cuda/sums.cu", "if (column >= heads * width) return;", ""),
    (
        "cuda/tensor_cores.cuh",
        "if (!(rows.group.kept >> i & 1) || column >= rows.width) return quad;",
        "if (column >= rows.width) return quad;",
    ),
    (
        "cuda/tensor_cores.cuh",
        "if (!(rows.group.kept >> i & 1) || column >= rows.width) return quad;",
        "if (!(rows.group.kept >> i & 1)) return quad;",
    ),
    ("cuda/tensor_cores.cuh", "if (column + c < rows.width)\n            quad", "quad"),
    ("cuda/tensor_cores.cuh", "if (r == 0 || is_whole)\n                    four =", "four ="),
    ("cuda/tensor_cores.cuh", "if (j % 4 < 2 || is_whole)\n                *target", "*target"),
    ("cuda/tensor_cores.cuh", "row + 8 * r < width - PAD", "true"),
    ("cuda/tensor_cores.cuh", "if (row + j / 2 * 8 < m.n_rows - PAD)", ""),
    ("causal/tensor_scan.cuh", "if (j % 4 < 2 || is_whole)", ""),
)
_TERMS = (
    ("cuda/warp.cuh", "*target = is_first ? total : *target + total;", "*target = total;"),
    (
        "cuda/warp.cuh",
        "*total = is_first ? (double)*sum : *total + *sum;",
        "*total = *target;",
    ),
    ("cuda/warp.cuh", "+ __shfl_xor_sync(~0u, given, WIDTH)", "+ given"),
    ("soft_hash/soft_hash.cuh", "corner >> (hash.n_planes - 1 - p) & 1", "corner >> p & 1"),
    ("soft_hash/soft_hash.cuh", "hash.down[j] * plus - hash.up[j] * minus", "hash.down[j] * plus"),
    ("soft_hash/soft_hash.cuh", "d_y * hash.beta * slope", "d_y * slope"),
    ("soft_hash/soft_hash.cuh", "if (thread_id() == 0) *total", "*total"),
    ("cuda/readout.cuh", "h[j] * factor + d_den * mass[s]", "h[j] * factor"),
    ("cuda/readout.cuh", "-token_total(sum) * factor", "-sum * factor"),
    ("cuda/readout.cuh", "-rho[j] * h[j] * f * masses.n_tables", "-rho[j] * h[j] * f"),
    ("bidirectional/kernels.cu", "d_phi[j] += (Real)d_state.mass[j % hash.padded_buckets];", ""),
    ("bidirectional/kernels.cu", "add_group(state, phi, phi, ", "add_group(state, phi + 1, phi, "),
    ("bidirectional/kernels.cu", "add_group(d_state, d_mass, rho, g);", ""),
    (
        "causal/kernels.cu",
        "masses[i * padded_buckets + s] = before + sum;",
        "masses[i * padded_buckets + s] = sum;",
    ),
    ("causal/kernels.cu", "mass[s] += sum;\n    }\n}\n\n// Saved", "}\n}\n\n// Saved"),
    ("causal/kernels.cu", "d_mass[s] += sum;", ""),
    (
        "causal/kernels.cu",
        "for (int i = TOKENS - 1; i >= 0; --i) {",
        "for (int i = 0; i < TOKENS; ++i) {",
    ),
    ("causal/kernels.cu", "g.first += call.d_out.head;", ""),
    (
        "causal/kernels.cu",
        "(task.end - 1 - task.begin) / TOKENS",
        "(task.end - task.begin) / TOKENS",
    ),
    (
        "causal/kernels.cu",
        "if (task.head % repeats == 0) copy(hash.u",
        "if (task.head % repeats == 1) copy(hash.u",
    ),
    (
        "cuda/sums.cu",
        "parts[i * step + offset] = total;",
        "parts[i * step + offset] = total + sums[j];",
    ),
    ("cuda/sums.cu", "for (i64 r = 1; r < repeats; ++r) sums[j] += part[r * width];", ""),
    ("soft_hash/soft_hash.cuh", "sums.beta += sums.warp_betas[warp];", "sums.beta += 0;"),
    ("cuda/tensor_cores.cuh", "order >= 0; --order", "order > 0; --order"),
    ("cuda/tensor_cores.cuh", "int order = LAST", "int order = LAST - 1"),
    ("cuda/tensor_cores.cuh", "order - i < M)", "order - i < M && i == 0)"),
    ("cuda/tensor_cores.cuh", "first -= one.value;", ""),
    ("cuda/tensor_cores.cuh", "two.bits &= 0xffff0000u;", ""),
    ("cuda/tensor_cores.cuh", "<< 16 * (c % 2)", "<< 16 * (1 - c % 2)"),
    ("cuda/tensor_cores.cuh", "2 * member_id() + 8 * r", "2 * member_id() + 8 * (1 - r)"),
    ("cuda/tensor_cores.cuh", "lower_halves(first, second);", "lower_halves(second, first);"),
    (
        "cuda/tensor_cores.cuh",
        "split(four.x[2], four.x[3], a, r + 2);",
        "split(four.x[3], four.x[2], a, r + 2);",
    ),
    ("cuda/tensor_cores.cuh", "adds ? *target + sums[j / 4].x[j % 4] : ", ""),
    (
        "cuda/tensor_cores.cuh",
        "for (int row = 0; row < m.n_rows - PAD; row += 16) {",
        "for (int row = 0; row < 16; row += 16) {",
    ),
    ("cuda/tensor_cores.cuh", "i = 2 * h + r % 2;", "i = 2 * h;"),
    (
        "cuda/tensor_cores.cuh",
        "first.x[j % 2], first.x[j % 2 + 2],",
        "first.x[j % 2 + 2], first.x[j % 2],",
    ),
    (
        "cuda/tensor_cores.cuh",
        "split(source[0], source[m.n_rows], b, r);",
        "split(source[0], source[0], b, r);",
    ),
    ("cuda/tensor_cores.cuh", "sums[i / 2].x[i % 2 * 2 + j]", "sums[i / 2].x[i % 2 + 2 * j]"),
    ("causal/tensor_scan.cuh", "backward ? j >= i : j <= i", "backward ? j >= i : j < i"),
    ("causal/tensor_scan.cuh", "backward ? j >= i : j <= i", "backward ? j > i : j <= i"),
    (
        "causal/tensor_scan.cuh",
        "if (!is_visible(row, column, backward))",
        "if (is_visible(column, row, backward))",
    ),
    ("causal/tensor_scan.cuh", "if (__any_sync(~0u, !finite)) {", "if (false) {"),
    ("causal/tensor_scan.cuh", "zero += sum.x[i] * 0;", "zero += 0;"),
    ("causal/tensor_scan.cuh", "is_visible(i, token + 1, backward) ?", "true ?"),
    (
        "causal/tensor_scan.cuh",
        "split(square.x[1].x[2 * tile], square.x[1].x[2 * tile + 1], b[tile], 1);",
        "split(square.x[1].x[2 * tile + 1], square.x[1].x[2 * tile], b[tile], 1);",
    ),
    ("causal/tensor_scan.cuh", "= square_of_coefficients(rho, phi, state.n_rows, false);", "= {};"),
    (
        "causal/tensor_scan.cuh",
        "add_coefficients(square_of_rows(g, v, false), phi, state.n_rows, false, h);",
        "",
    ),
    ("causal/tensor_scan.cuh", "square_of_rows(v, g, true)", "square_of_rows(g, v, true)"),
    ("causal/tensor_scan.cuh", "project(d_state, v, d_phi, true);", ""),
    (
        "causal/tensor_scan.cuh",
        "first.rho + r * step, d_state.n_rows, true, d_phi",
        "first.rho, d_state.n_rows, true, d_phi",
    ),
    (
        "causal/tensor_scan.cuh",
        "= square_of_coefficients(phi, first.rho + r * step, d_state.n_rows, true);",
        "= {};",
    ),
)


def changes() -> Iterator[Mutation]:
    """Yield the mutations of bounds and terms."""
    for table, watchers in (
        ((*_BOUNDS, *SOCKET_BOUNDS), ("address", "results")),
        ((*_TERMS, *SOCKET_TERMS), ("results",)),
    ):
        for file, old, new in table:
            start = (_OPS / file).read_text().find(old)
            if start < 0:
                raise AssertionError(f"{file} no longer contains {old!r}")
            yield Mutation(file, start, old, new, watchers)


def noticed_by(mutation: Mutation) -> str | None:
    """Return the first watcher that fails with the mutated kernels, or None."""
    with tempfile.TemporaryDirectory() as folder:
        ops = Path(folder) / "ops"
        shutil.copytree(_OPS, ops, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
        text = (ops / mutation.file).read_text()
        end = mutation.start + len(mutation.old)
        (ops / mutation.file).write_text(text[: mutation.start] + mutation.new + text[end:])
        of_socket = mutation.file.startswith("socket/")
        return next((w for w in mutation.watchers if failure(w, ops, of_socket, _LIMIT)), None)


def main() -> None:
    """Try all mutations, or those whose description contains every argument."""
    unnoticed = []
    for mutation in [*changes(), *barriers()]:
        if not all(word in str(mutation) for word in sys.argv[1:]):
            continue
        watcher = noticed_by(mutation)
        print(f"{watcher or 'UNSEEN':8} {mutation}".replace("\n", " "), flush=True)
        if watcher is None:
            unnoticed.append(mutation)
    sys.exit(f"{len(unnoticed)} mutations were not noticed" if unnoticed else 0)


if __name__ == "__main__":
    main()
