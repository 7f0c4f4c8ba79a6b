"""What can be done with a dataset directory as a whole: `python -m crpt.dataset`.

Import and export speak the layout of DrQ-v2, URLB and ExORL: one compressed .npz per episode.
"""

from __future__ import annotations

from crpt.dataset.episode_files import EpisodeFileError
from crpt.dataset.exporting import Exported, export_episodes
from crpt.dataset.importing import Imported, import_episodes
from crpt.dataset.information import describe
from crpt.dataset.verification import DomainReport, verify

__all__ = [
    "DomainReport",
    "EpisodeFileError",
    "Exported",
    "Imported",
    "describe",
    "export_episodes",
    "import_episodes",
    "verify",
]
