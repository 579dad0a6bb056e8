"""Where things lie: the repository, the shared data beside it, the oracle's environment."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"  # absent outside the project's own machines: tests skip
ORACLE = ROOT / "tests" / "oracle"
ORACLE_PYTHON = ROOT / ".venv-oracle" / "bin" / "python"
NODE_MODULES = ROOT / ".node-tools" / "node_modules"  # of launch/test_tools.sh; absent: tests skip
