"""Options of the command line, which messages name, as the Python interface spells them."""

import re

OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")

IN_PYTHON = {
    **{
        f"--{name.replace('_', '-')}": f"{name}=..."
        for name in (
            "budget", "keep", "threads", "seed", "timeout", "exclude", "only", "runtime", "timings", "export", "opset",
            "free_axes", "device", "minutes", "epochs", "rate", "batch", "temperature", "features", "augment", "labels",
            "data", "budgets", "resource", "metric", "cluster", "graphs", "to",
        )
    },
    **{f"--{name.replace('_', '-')}": f"{name}=True" for name in ("fast", "any_speed", "int8", "refine", "resume", "half")},
    "--no-refine": "refine=False",
    "--no-resume": "resume=False",
    "--onnx": "measure=True",
    "--no-onnx": "measure=False",
    "--all": "everything=True",
    "--memory": "memory=... in bytes",
    "--output": "outputs={NAME: KIND}",
    "--calib": "calibration=...",
    "--input": "example_input=...",
    "--rule": "rules=[...]",
    "--factory": "convrewrite.loading.load_model(source, factory=...)",
    "--trust": "convrewrite.loading.load_model(source, trust=True)",
    **{f"--{name}": f"convrewrite.calibration.Reading({name}=...)" for name in ("mean", "std", "resize")},
}  # fmt: skip
"""What the Python interface takes in place of an option. Options that it does not have are left out."""


def in_python(text: str) -> str | None:
    """A line that says how Python spells the options in a message; None where there are none, or the message says it itself."""
    named = {option: IN_PYTHON[option] for option in OPTION.findall(text) if option in IN_PYTHON}
    said = [f"{option} is {spelling}" for option, spelling in named.items() if spelling not in text]
    return f"In Python {', '.join(said)}" if said else None
