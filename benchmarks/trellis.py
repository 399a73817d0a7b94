"""Codes of several weights on Gaussian numbers: error per element, and what encoding and decoding take.

    python -m benchmarks.trellis                                    QTIP's trellis with 2^8 … 2^16 states, and E8P
    python -m benchmarks.trellis --states 12 --bits 2 --codes 1mad  some of them
    python -m benchmarks.trellis --states 12 14 --bits 1 5 6 8      widths that E8P has not, and no times of decoding
    python -m benchmarks.trellis --table                            docs/results/trellis.md, from the rows

Numbers are N(0, 1) in a matrix of 256 columns, at the scale that the code is made for; of every size of state the
number of rows is such that encoding takes some seconds. Decoding is of 512 × 2048 weights, 256 rows at a time into the
same place, the best of 30 rounds in which all take turns. Rows are appended to benchmarks/results/trellis.jsonl
(``--out``).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.quality import Row, append, rows_of
from benchmarks.quality_table import fill
from llmtools.document import markdown_table
from llmtools.kernels.lattice import RESIDUAL_SCALE, SCALE, dequantize_lattice, encode_lattice
from llmtools.kernels.trellis import dequantize_trellis, encode_trellis, fitted_table, has_hybrid
from llmtools.quant.grids.trellis import Trellis

CODES = ("1mad", "3inst", "hyb")  # QTIP's; EXL3's are as good
HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "trellis.jsonl"
PAGE = HERE.parent / "docs" / "results" / "trellis.md"
STATES = (8, 10, 12, 14, 16)
COLUMNS = 256
ROUNDS = 30


def trellis_row(bits: int, state_bits: int, code: str, rows: int) -> Row:
    grid = Trellis(bits, state_bits, code)
    table = fitted_table(bits, state_bits) if code == "hyb" else None

    def encode(x: Tensor) -> Tensor:
        return encode_trellis(x * grid.scale, bits, state_bits, code, table=table)

    def decode(packed: Tensor) -> Tensor:
        return dequantize_trellis(packed, bits, state_bits, code, table=table) / grid.scale

    row = _error(encode, decode, rows)
    return {"kind": f"trellis, {code}", "state_bits": state_bits, "bits": bits, "scale": grid.scale, **row}


def lattice_row(bits: int, rows: int) -> Row:
    factor, scale = RESIDUAL_SCALE[bits], SCALE[bits]

    def encode(x: Tensor) -> tuple[Tensor, Tensor | None]:
        return encode_lattice(x * scale, bits)

    def decode(packed: tuple[Tensor, Tensor | None]) -> Tensor:
        return dequantize_lattice(*packed, factor) / scale

    return {"kind": "E8P", "state_bits": None, "bits": bits, "scale": scale, **_error(encode, decode, rows)}


def _error(encode: Callable[..., object], decode: Callable[..., Tensor], rows: int) -> Row:
    x = torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(0))
    encode(x[:16])  # the library is built and loaded
    started = time.process_time()
    packed = encode(x)
    seconds = time.process_time() - started
    tiles = (decode(packed) - x).square_().view(rows // 16, 16, -1, 16).double().mean((1, 3)).flatten()
    return {
        "error": float(tiles.mean()), "standard_error": float(tiles.std()) / len(tiles) ** 0.5,
        "encode_ns": 1e9 * seconds / x.numel(), "weights": x.numel(),
    }  # fmt: skip


def decoding() -> list[Row]:
    """Nanoseconds a weight to bfloat16 and float32, of all kinds in turn."""
    runs: dict[tuple[str, int, str], Callable[[], object]] = {}
    generator = torch.Generator().manual_seed(0)
    for bits in (2, 3, 4):
        codes = torch.randint(-(2**15), 2**15, (512, 256), generator=generator).to(torch.int16)
        residual = {2: None, 3: codes.to(torch.uint8), 4: codes.flip(0)}[bits]
        packed = torch.randint(-(2**15), 2**15, (512, 128 * bits), generator=generator).to(torch.int16)
        for dtype in (torch.bfloat16, torch.float32):
            name = str(dtype).removeprefix("torch.")

            def lattice(
                codes: Tensor = codes, residual: Tensor | None = residual, bits: int = bits, dtype: torch.dtype = dtype
            ) -> None:
                for part in (slice(256), slice(256, 512)):
                    second = residual[part] if residual is not None else None
                    dequantize_lattice(codes[part], second, RESIDUAL_SCALE[bits], dtype)

            runs["E8P", bits, name] = lattice
            for code in CODES:
                table = fitted_table(bits, 12) if code == "hyb" else None

                def trellis(
                    packed: Tensor = packed,
                    table: Tensor | None = table,
                    bits: int = bits,
                    code: str = code,
                    dtype: torch.dtype = dtype,
                ) -> None:
                    for start in (0, 256):
                        dequantize_trellis(packed, bits, 12, code, start, start + 256, dtype, table=table)

                runs[f"trellis, {code}", bits, name] = trellis
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(ROUNDS):
        for key, run in runs.items():
            started = time.perf_counter()
            run()
            best[key] = min(best[key], time.perf_counter() - started)
    return [
        {"kind": kind, "bits": bits, "to": name, "decode_ns": 1e9 * seconds / (512 * 2048)}
        for (kind, bits, name), seconds in best.items()
    ]


def tables(rows: list[Row]) -> dict[str, str]:
    """Name → Markdown; of rows that measure the same the newest counts."""
    newest = {tuple(row.get(key) for key in ("kind", "bits", "state_bits", "to")): row for row in rows}
    errors = sorted(
        (row for row in newest.values() if "error" in row),
        key=lambda row: (row["bits"], row["kind"], row["state_bits"] or 0),
    )
    times = [row for row in newest.values() if "decode_ns" in row]
    lines = [
        [str(row["bits"]), row["kind"], str(row["state_bits"] or "–"),
         _error_shown(row), f"{row['error'] * 4 ** row['bits']:.2f}",
         f"{row['encode_ns']:.0f}"]
        for row in errors
    ]  # fmt: skip
    head = ["bits", "code", "bits of state", "error per element", "× the bound 4⁻ᵏ", "encoding, ns a weight"]
    kinds = list(dict.fromkeys((row["bits"], row["to"]) for row in times))
    at = {(row["kind"], row["bits"], row["to"]): row["decode_ns"] for row in times}
    names = list(dict.fromkeys(row["kind"] for row in times))
    speed = [
        [
            str(bits),
            to,
            *(f"{at[name, bits, to]:.2f} ({at[name, bits, to] / at['E8P', bits, to]:.2f})" for name in names),
        ]
        for bits, to in kinds
    ]
    return {"error": markdown_table(head, lines), "decode": markdown_table(["bits", "to", *names], speed)}


def _error_shown(row: Row) -> str:
    decimals = max(5, row["bits"])
    return f"{row['error']:.{decimals}f} ± {row['standard_error']:.{decimals}f}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--states", type=int, nargs="+", default=list(STATES), help="bits of state, 8 to 16")
    parser.add_argument("--codes", nargs="+", default=list(CODES))
    parser.add_argument("--rows", type=int, default=512, help="rows for 2^12 states; more or fewer for other states")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only the page, from the rows")
    args = parser.parse_args(argv)
    if args.table:
        print(fill(PAGE, tables(rows_of(args.out))))
        return 0
    made: list[Row] = [lattice_row(bits, 16 * args.rows) for bits in args.bits if bits in RESIDUAL_SCALE]
    made += decoding() if made else []
    for row in made:
        _record(row, args.out)
    for state_bits in args.states:
        rows = max(args.rows // 2, min(16 * args.rows, args.rows << 12 >> state_bits)) // 16 * 16
        for bits in args.bits:
            for code in args.codes:
                if code == "hyb" and not has_hybrid(bits, state_bits):
                    continue
                _record(trellis_row(bits, state_bits, code, rows), args.out)
    return 0


def _record(row: Row, out: Path) -> None:
    append(row, out)
    print(
        ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
    )


if __name__ == "__main__":
    sys.exit(main())
