"""A table of what the model writes, on the console and in every tracker that is open."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tqdm import tqdm


def show_samples(
    samples: Sequence[Mapping[str, Any]], trainer: Any, *, name: str = "completions", title: str = ""
) -> None:
    """Show samples on the console, and send them to trackio, wandb and tensorboard as far as `report_to` names them.

    Args:
        samples: One mapping of column to value per row, with the same columns.
        trainer: The trainer: its step, its trackers.
        name: Of the table in the trackers.
        title: A line above the table on the console.
    """
    if not samples or not trainer.is_world_process_zero():
        return
    tqdm.write("\n".join(part for part in (title, markdown_table(samples)) if part))
    for tracker in _open_trackers(trainer.args.report_to):
        import pandas as pd

        tracker.log({name: tracker.Table(dataframe=pd.DataFrame(list(samples)))})
    for callback in trainer.callback_handler.callbacks:
        writer = getattr(callback, "tb_writer", None)  # transformers' TensorBoardCallback
        if writer is not None:
            writer.add_text(name, markdown_table(samples, width=2000), trainer.state.global_step)


def markdown_table(samples: Sequence[Mapping[str, Any]], width: int = 60) -> str:
    """Samples as a Markdown table, a row each; texts are brought to one line of at most `width` characters."""
    if not samples:
        return ""
    names = list(samples[0])
    rows = [names, ["---"] * len(names), *([_cell(sample[name], width) for name in names] for sample in samples)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(value: Any, width: int) -> str:
    text = " ".join(str(value).split()).replace("|", "\\|")
    return text if len(text) <= width else f"{text[: width // 2]} … {text[-(width // 2) :]}"


def _open_trackers(names: Iterable[str]) -> list[Any]:
    """trackio and wandb, where they are asked for, installed and running; their tables are made alike."""
    trackers = []
    for name in ("trackio", "wandb"):
        if name in names and importlib.util.find_spec(name) is not None:
            tracker = importlib.import_module(name)
            if name == "trackio" or tracker.run is not None:
                trackers.append(tracker)
    return trackers
