"""Lets the tests here import record.py and its parts by name, as the script itself does."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
