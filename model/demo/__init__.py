"""The folder holds the demo model: its checkpoint in the public format and the scripts that made the checkpoint."""

from pathlib import Path

DEMO = Path(__file__).parent / "checkpoint"
