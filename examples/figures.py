"""What an example has measured as a file, for the tables and pictures of the documents (make report)."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))  # an example is run as a script, from anywhere
from benchmarks.figures import add_output as add_output  # noqa: E402
from benchmarks.figures import write as write  # noqa: E402
