"""Two models side by side, for the terminal."""

from convrewrite.reporting import figures
from convrewrite.runtime import Verification
from convrewrite.tables import shortened, table
from convrewrite.values import cosine, counted, share

HEADERS = (
    "output", "taken for", "max. diff.", "max. / max.", "tolerance", "the same", "rel. error", "unexpl. variance",
    "top-1 agreement", "KL", "cosine", "equal entries",
)  # fmt: skip
OPTIONAL = ("unexpl. variance", "top-1 agreement", "KL", "cosine", "equal entries")


def render_verification(outcome: Verification, examples: int, source: str) -> str:
    """Every output that was compared, what it was taken for and why, and on what."""
    rows = [_row(outcome, index) for index in range(len(outcome.parity.outputs))]
    shown = [i for i, header in enumerate(HEADERS) if header not in OPTIONAL or any(row[i] for row in rows)]
    drawn = table([HEADERS[i] for i in shown], [[row[i] for i in shown] for row in rows], "ll" + "r" * (len(shown) - 2))
    taken = [figures.taken(name, m.kind, m.reason, m.weight) for name, m in outcome.fidelity.meanings.items()]
    lines = [drawn, f"on {counted(examples, source.removesuffix('s'))}", *taken]
    if outcome.fidelity.left_out:
        lines.append(f"not compared, as they are no tensors: {', '.join(outcome.fidelity.left_out)}")
    return "\n".join(map(shortened, lines))


def _row(outcome: Verification, index: int) -> tuple[str, ...]:
    """One output's cells."""
    parity, fidelity = outcome.parity.outputs[index], outcome.fidelity.outputs[index]
    return (
        parity.name,
        fidelity.kind,
        f"{parity.max_abs_difference:.2g}",
        f"{parity.relative_error:.2g}",
        f"{parity.tolerance:.0e}",
        "yes" if parity.passed else "no",
        f"{fidelity.relative_error:.3%}" if fidelity.equal_share is None else "",
        figures.cell(fidelity.unexplained, ".2%"),
        figures.cell(fidelity.top1_agreement, share),
        figures.cell(fidelity.kl, ".3g"),
        figures.cell(fidelity.cosine, cosine),
        figures.cell(fidelity.equal_share, share),
    )
