"""The demo model: its checkpoint, in the public format, and the scripts that made it."""

from pathlib import Path

DEMO = Path(__file__).parent / "checkpoint"
