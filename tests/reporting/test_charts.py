"""Drawings of pages."""

import os
import subprocess
import sys
from pathlib import Path


def test_matplotlib_is_imported_as_something_is_drawn_and_does_not_say_where_its_fonts_are_kept(tmp_path: Path) -> None:
    (tmp_path / "file").touch()  # a folder that cannot be made, whoever runs this
    program = (
        "import sys, convrewrite.pipeline, convrewrite.reporting.charts as charts; assert 'matplotlib' not in sys.modules; "
        "assert charts.depth_chart([charts.ErrorPoint(1, None, 0.1)]).startswith('<svg')"
    )
    nowhere = {name: str(tmp_path / "file") for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR")}
    ran = subprocess.run([sys.executable, "-c", program], env=os.environ | nowhere, capture_output=True, check=False)
    assert ran.returncode == 0 and ran.stderr == b"", ran.stderr
