"""Several runs on one page, sorted by effect: which K, which temperature, which weight?

A run's effect is that of its student over its own control, on its own problems. Runs whose settings differ in nothing but seeds are one
setting with several seeds: their effect is the mean, with an interval over seeds and problems (see `statistics.py`).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_reasoning_distill.data.files import write_json
from trl_reasoning_distill.data.schema import Prediction
from trl_reasoning_distill.evaluation.charts import SERIES, difference_chart, draw_curves
from trl_reasoning_distill.evaluation.compare import BASE, CONTROL, STUDENT, TEACHER, Comparison, compare_models
from trl_reasoning_distill.evaluation.findings import printable
from trl_reasoning_distill.evaluation.report import write_page
from trl_reasoning_distill.evaluation.runs import Run, read_predictions, read_run
from trl_reasoning_distill.evaluation.scores import RUN_MARK


@dataclasses.dataclass(frozen=True)
class Setting:
    """Runs that differ in nothing but seeds.

    Attributes:
        name: Name of the first run.
        runs: The runs.
        varied: Those of its options in which it differs from other settings.
        comparison: What came out, over all its runs.
    """

    name: str
    runs: tuple[Run, ...]
    varied: dict[str, Any]
    comparison: Comparison

    @property
    def effect(self) -> float:
        """What it is sorted by: the difference to the control; its accuracy above all where it has no control."""
        pair = self.comparison.headline
        return pair.difference if pair else max(result.accuracy for result in self.comparison.models.values())

    @property
    def seconds(self) -> float:
        """Mean wall time of a run."""
        return sum(run.seconds for run in self.runs) / len(self.runs)


def write_ablation_report(
    runs: Sequence[str | os.PathLike[str]],
    output_dir: str | os.PathLike[str],
    *,
    title: str = "Ablations",
    base: str = BASE,
    teacher: str = TEACHER,
    control: str = CONTROL,
    student: str = STUDENT,
    resamples: int = 10_000,
    seed: int = 0,
) -> list[Setting]:
    """Compare runs and write `report.html`, `report.md` and `comparison.json`.

    Args:
        runs: Folders of runs, as `trl-distill run` leaves them.
        output_dir: Folder for the three files; made if missing.
        title: Heading of the page.
        base: As in `compare_models`; the same in all runs.
        teacher: Likewise.
        control: Likewise.
        student: Likewise.
        resamples: Bootstrap resamples per interval.
        seed: Of the resampling.

    Returns:
        The settings, the largest effect first.

    Raises:
        MissingExtraError: If matplotlib or Jinja2 is not installed.
        FileNotFoundError: If a folder is not that of a run with an evaluation.
        ValueError: If predictions cannot be compared, or two runs have one name.
    """
    found = [read_run(run) for run in runs]
    names = [run.name for run in found]
    if len(set(names)) < len(names):
        raise ValueError(f"Two runs have the same name: {', '.join(names)}; give folders of different names.")
    roles = {"base": base, "teacher": teacher, "control": control, "student": student}
    settings = []
    for members, varied in group_runs(found):
        comparison = compare_models(_merge(members, (base, teacher)), **roles, resamples=resamples, seed=seed)
        settings.append(Setting(members[0].name, tuple(members), varied, comparison))
    settings.sort(key=lambda setting: -setting.effect)
    page = _page(settings, title, student)
    output = Path(output_dir)
    write_json(output / "comparison.json", {"settings": [_to_dict(setting) for setting in settings]})
    for name in ("report.md", "report.html"):
        write_page(output / name, f"ablation_{name}.j2", page)
    return settings


def group_runs(runs: Sequence[Run]) -> list[tuple[list[Run], dict[str, Any]]]:
    """Runs that differ in nothing but seeds, together; each group with the options in which it differs from the others."""
    plain = [{key: value for key, value in run.settings.items() if not _is_seed(key)} for run in runs]
    varied = _varied(plain)
    groups: dict[str, tuple[list[Run], dict[str, Any]]] = {}
    for run, settings in zip(runs, plain, strict=True):
        own = {key: settings.get(key) for key in varied}
        groups.setdefault(repr(own), ([], own))[0].append(run)
    return list(groups.values())


def _varied(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The options that runs have and have set differently.

    An option that some runs lack, being of another stage or an older version, is one of them only if those runs differ in nothing else.
    """
    keys = sorted(set().union(*settings))
    varied = [key for key in keys if len({repr(each[key]) for each in settings if key in each}) > 1]
    for key in keys:
        kinds = {repr([each.get(known) for known in varied]) for each in settings}
        if len({repr([each.get(known) for known in [*varied, key]]) for each in settings}) > len(kinds):
            varied.append(key)
    return sorted(varied)


def result_line(settings: Sequence[Setting], report: str) -> str:
    """The report's result in one line."""
    best = settings[0]
    pair = best.comparison.headline
    effect = f"{100 * pair.difference:+.1f} points over {pair.second}" if pair else f"{100 * best.effect:.1f} %"
    return f"{len(settings)} settings; best {best.name}, {effect}; report at {report}"


def _merge(runs: Sequence[Run], untrained: tuple[str, str]) -> Iterable[Prediction]:
    """The predictions of all runs, those of base and teacher once, and the others by run where there are several."""
    for number, run in enumerate(runs):
        for prediction in read_predictions(run.evaluation):
            model = printable(prediction.model)
            if len(runs) == 1:
                yield dataclasses.replace(prediction, model=model)
            elif model not in untrained:
                yield dataclasses.replace(prediction, model=f"{model}{RUN_MARK}{number}")
            elif number == 0:
                yield prediction


def _page(settings: Sequence[Setting], title: str, student: str) -> dict[str, Any]:
    pairs = {setting.name: setting.comparison.headline for setting in settings}
    known = {name: pair for name, pair in pairs.items() if pair is not None}
    trainings = {
        setting.name: folder
        for setting in settings
        for name, folder in setting.runs[0].training.items()
        if name.partition(RUN_MARK)[0] == student
    }
    shown = list(trainings)[: len(SERIES)]
    colors = dict(zip(shown, SERIES, strict=False))
    return {
        "title": printable(title),
        "settings": settings,
        "columns": _columns(list(settings[0].varied)),
        "chart": difference_chart(known) if known else None,
        "curves": draw_curves({name: trainings[name] for name in shown}, colors),
        "left_out": len(trainings) - len(shown),
        "student": student,
        "runs": sum(len(setting.runs) for setting in settings),
        "first": settings[0].comparison,
    }


def _columns(keys: Sequence[str]) -> dict[str, str]:
    """Options to their headings: without the stage where no other stage's option has the name."""
    names = [key.rpartition(".")[2] for key in keys]
    return {key: name if names.count(name) == 1 else key for key, name in zip(keys, names, strict=True)}


def _to_dict(setting: Setting) -> Mapping[str, Any]:
    return {
        "name": setting.name,
        "runs": [run.name for run in setting.runs],
        "varied": setting.varied,
        "effect": setting.effect,
        "seconds": setting.seconds,
        "comparison": setting.comparison.to_dict(),
    }


def _is_seed(key: str) -> bool:
    return key.rpartition(".")[2].endswith("seed")
