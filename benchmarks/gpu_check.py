"""Everything about one GPU in one run: is the loss right there, how fast is it, what do a step, a capture and the doctor look like.

    python benchmarks/gpu_check.py --output benchmarks/results/gpu     # `make gpu-check`: about nine minutes
    python benchmarks/gpu_check.py --quick                             # tiny shapes, on a CPU too: does it run?

A section that fails says so and the next goes on. Figures go to OUTPUT.json, the page to OUTPUT.md, profiles beside them. Shapes are
those of Qwen2.5 at 0.5B and 7B: 8,192 tokens, 151,936 ids, hidden states of 896 and 4,096.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

LOSSES = (
    *("three matmuls", "ours SFT", "ours SFT + KD", "ours SFT + KD, T=2", "ours SFT + KD, frozen head"),
    *("ours SFT + KD, half masked", "TRL fused SFT", "Liger fused CE", "cut-cross-entropy", "cross-entropy"),
    *("textbook SFT + KD", "ours live Top-K KL", "ours live full KL", "ours live full JSD 0.5", "TRL chunked KL"),
    *("TRL GKD JSD 0.5", "Liger fused JSD"),
)
STEPS = ("TRL SFT", "ours SFT", "ours SFT + KD", "Hugging Face SFT")
Figures = dict[str, Any]


@dataclass
class Check:
    """Where and how large, and what was found.

    Attributes:
        device: `cuda` or `cpu`.
        quick: Tiny shapes.
        output: Where figures and page go, without a suffix.
        seconds: No section begins after this.
    """

    device: str
    quick: bool
    output: Path
    seconds: float
    figures: dict[str, Figures] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    @property
    def on_gpu(self) -> bool:
        """Whether there is a GPU to wait for and to measure."""
        return self.device == "cuda"

    @property
    def vocab(self) -> int:
        """Ids of the head."""
        return 2048 if self.quick else 151_936

    @property
    def tokens(self) -> int:
        """Supervised tokens of the loss."""
        return 64 if self.quick else 8192

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths of hidden states."""
        return (64,) if self.quick else (896, 4096)

    def say(self, text: str) -> None:
        """A line of the page."""
        self.lines.append(text)
        print(f"[{time.monotonic() - self.started:5.0f}s] {text}", flush=True)

    def section(self, name: str, run: Callable[[Check], Figures]) -> None:
        """Run a section, unless the time is over; a failure does not stop the rest."""
        if time.monotonic() - self.started > self.seconds:
            self.say(f"{name}: skipped, out of time")
            return
        self.lines += ["", f"## {name}", ""]
        try:
            self.figures[name] = run(self)
        except Exception as error:  # whatever it is, the other sections have figures to give
            self.figures[name] = {"error": f"{type(error).__name__}: {error}"}
            self.say(f"failed: {type(error).__name__}: {str(error)[:300]}")
            traceback.print_exc()
        self.free()

    def free(self) -> None:
        """Give back what a case has left."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def measure(self, run: Callable[[], Any], rounds: int = 7) -> Figures:
        """Median milliseconds, and on a GPU the peak in MiB above what was there."""
        rounds = 1 if self.quick else rounds
        run()
        times = []
        for _ in range(rounds):
            self.wait()
            start = time.perf_counter()
            run()
            self.wait()
            times.append(1e3 * (time.perf_counter() - start))
        figures = {"ms": sorted(times)[rounds // 2]}
        if self.on_gpu:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run()
            self.wait()
            figures["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        return figures

    def wait(self) -> None:
        """Until the device is done."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def write(self) -> None:
        """Figures and page."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.output.with_suffix(".json").write_text(json.dumps(self.figures, indent=1, default=str) + "\n")
        head = f"`python benchmarks/gpu_check.py{' --quick' * self.quick}`, in {time.monotonic() - self.started:.0f} s"
        self.output.with_suffix(".md").write_text("\n".join([head, *self.lines]) + "\n")


def relative(a: Tensor, b: Tensor) -> float:
    """Norm of the difference over that of `b`."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def tests(check: Check) -> Figures:
    """The tests of the losses and trainers that need a GPU."""
    figures = {}
    for folder, seconds in (("tests/losses", 240), ("tests/trainer/test_settings.py", 90)):
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", folder]
        done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, timeout=seconds)
        figures[folder] = {"status": done.returncode, "summary": (done.stdout.strip().splitlines() or [""])[-1]}
        check.say(f"{folder}: {figures[folder]['summary']}")
        for line in done.stdout.splitlines():
            if line.startswith(("FAILED", "ERROR")):
                check.say(line[:200])
    return figures


def ceilings(check: Check) -> Figures:
    """What the machine can do at best: a square matmul, a copy."""
    size = 256 if check.quick else 8192
    a, b = (torch.randn(size, size, device=check.device, dtype=torch.bfloat16) for _ in range(2))
    x = torch.zeros(2**16 if check.quick else 2**30, device=check.device, dtype=torch.bfloat16)
    y = torch.empty_like(x)
    matmul = 2 * size**3 / check.measure(lambda: a @ b)["ms"] / 1e9
    copy = 4 * x.numel() / check.measure(lambda: y.copy_(x))["ms"] / 1e9
    card = torch.cuda.get_device_name() if check.on_gpu else platform.machine()
    versions = {name: importlib.import_module(name).__version__ for name in ("torch", "transformers", "trl", "numpy")}
    check.say(f"{card}: matmul {matmul:.0f} TFLOP/s, copy {copy:.2f} TB/s; {versions}")
    return {"card": card, "tflops": matmul, "tb_per_s": copy, **versions}


def kernels(check: Check) -> Figures:
    """The row kernels alone, against float64: beyond 2³¹ elements, at three alignments; and their bandwidth."""
    from trl_reasoning_distill.losses import _kernels, _rows

    module = _kernels.kernels("rows", check.device, torch.bfloat16) or _rows
    check.say(f"{module.__name__}")
    rows, figures = 16 if check.quick else 16_384, {}
    odd = min(271, check.vocab // 4)
    for name, start, stop in (
        ("whole rows", 0, check.vocab),
        ("odd number of shared ids", 0, check.vocab - odd),
        ("odd start", check.vocab - odd, check.vocab),
    ):
        for temperature in (1.0, 2.0, 3.0):
            tile = torch.randn(rows, check.vocab, device=check.device, dtype=torch.bfloat16).mul_(3)
            figures[f"{name}, T={temperature:g}"] = _kernel(check, module, tile[:, start:stop], temperature, name)
            del tile
            check.free()
    return figures


def _kernel(check: Check, module: Any, part: Tensor, temperature: float, name: str) -> Figures:
    rows = len(part)
    rival, half = part.amax(-1).float(), torch.full((rows,), 0.5, device=check.device)
    sample = torch.tensor([0, 1, rows // 2, rows - 2, rows - 1], device=check.device)
    z = part[sample].double()
    at_temperature = z / temperature
    statistics = module.row_statistics(part, temperature, rival)
    errors = {
        "log_sum_exp": relative(statistics.log_sum_exp[sample], z.logsumexp(-1)),
        "log_sum_exp_t": relative(statistics.log_sum_exp_t[sample], at_temperature.logsumexp(-1)),
        "first_tie": int((statistics.first_tie[sample] != z.argmax(-1)).sum()),
    }
    expected = 0.5 * z.softmax(-1) + (0.5 * at_temperature.softmax(-1) if temperature != 1 else 0)

    def gradient() -> None:
        module.row_gradient_(part, statistics, half, None if temperature == 1 else half, temperature, 1.0, None)

    read = check.measure(lambda: module.row_statistics(part, temperature, rival), 5)["ms"]
    gradient()
    errors["gradient"] = relative(part[sample], expected)
    written = check.measure(gradient, 5)["ms"]
    gigabytes = part.numel() * 2 / 1e9
    check.say(
        f"{name}, T={temperature:g}: statistics {read:.2f} ms ({gigabytes / read:.2f} TB/s), gradient {written:.2f} ms "
        f"({2 * gigabytes / written:.2f} TB/s), errors {', '.join(f'{key} {value:.0e}' for key, value in errors.items())}"
    )
    return {"statistics_ms": read, "gradient_ms": written, "errors": errors}


def exactness(check: Check) -> Figures:
    """Loss and gradients at the real vocabulary against float64, with the weights of a large batch and a gradient scaler; twice over."""
    from trl_reasoning_distill.losses.divergence import TopKTargets
    from trl_reasoning_distill.losses.fused import LinearTeacher, fused_linear_distillation_loss

    torch.manual_seed(0)
    tokens, width, scale = (16 if check.quick else 192), check.widths[0], 65_536.0
    weight = torch.randn(check.vocab, width, device=check.device) * 0.05
    labels = torch.randint(check.vocab, (tokens,), device=check.device)
    hidden = torch.randn(tokens, width, device=check.device) + 4 * weight[labels]
    figures: Figures = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        h, w = hidden.to(dtype), weight.to(dtype)
        noise = torch.randn(tokens, check.vocab, device=check.device)
        top = ((h.double() @ w.double().t() + noise) / 2).log_softmax(-1).topk(25)
        teacher = TopKTargets(top.indices, top.values.float())
        exact = _exact_gradients(h, w, labels, teacher)

        def gradients(chunk: int | None, h: Tensor = h, w: Tensor = w, teacher: Any = teacher) -> list[Tensor]:
            leaves = [x.clone().requires_grad_() for x in (h, w)]
            weights = {"sft_weight": 1 / scale, "kd_weight": 1 / scale}
            out = fused_linear_distillation_loss(
                *leaves, labels, teacher=teacher, **weights, temperature=2.0, chunk_size=chunk
            )
            return list(torch.autograd.grad(out.loss * scale, leaves))

        runs = [gradients(chunk) for chunk in (None, None, 64)]
        errors = [max(map(relative, run, exact)) for run in (runs[0], runs[2])]
        same = all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
        name = str(dtype).removeprefix("torch.")
        figures[name] = {"gradient": errors, "repeatable": same}
        check.say(
            f"{name}: gradient {errors[0]:.1e} off, in chunks of 64 {errors[1]:.1e}; repeatable to the bit: {same}"
        )
    leaves = [x.bfloat16().requires_grad_() for x in (hidden, weight)]
    for top_k in (25, None):
        same_model = LinearTeacher(hidden.bfloat16(), weight.bfloat16(), top_k=top_k)
        kd = fused_linear_distillation_loss(*leaves, labels, teacher=same_model, kd_weight=1.0, divergence="jsd").kd
        figures[f"itself as teacher, top_k={top_k}"] = float(kd.max())
        check.say(f"itself as a live teacher, top_k={top_k}: largest divergence {float(kd.max()):.1e}")
    return figures


def _exact_gradients(hidden: Tensor, weight: Tensor, labels: Tensor, teacher: Any) -> list[Tensor]:
    """Cross-entropy and T² times the KL on K + 1 buckets at T = 2, summed over tokens, in float64."""
    leaves = [x.double().requires_grad_() for x in (hidden, weight)]
    logits = leaves[0] @ leaves[1].t()
    log_q, log_p = torch.log_softmax(logits / 2, -1).gather(1, teacher.ids), teacher.log_probs.double()
    tail_p, tail_q = 1 - log_p.exp().sum(-1), 1 - log_q.exp().sum(-1)
    kd = 4 * ((log_p.exp() * (log_p - log_q)).sum(-1) + tail_p * (tail_p / tail_q).log())
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum") + kd.sum()
    return list(torch.autograd.grad(loss, leaves))


def losses(check: Check, width: int) -> Figures:
    """The table of `benchmarks/loss.py` at one width, and where the time of the main case goes."""
    suite = importlib.import_module("loss")
    options = argparse.Namespace(
        tokens=check.tokens, hidden=width, vocab=check.vocab, k=25, dtype="bfloat16", device=check.device
    )
    figures: Figures = {}
    for name in LOSSES:
        _case(check, figures, name, lambda name=name: suite.SUITE.cases[name](options, False))
    suite._shared_inputs.cache_clear()
    if check.on_gpu:
        figures["queued"] = _profile(check, suite.SUITE.cases["ours SFT + KD"](options, False), f"-profile-{width}.txt")
        suite._shared_inputs.cache_clear()
    return figures


def _profile(check: Check, run: Callable[[], Any], suffix: str) -> Figures:
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        check.wait()
    table = profile.key_averages().table(sort_by="self_device_time_total", row_limit=25)
    check.output.parent.mkdir(parents=True, exist_ok=True)
    check.output.with_name(check.output.name + suffix).write_text(table)
    start = time.perf_counter()
    run()
    queued = 1e3 * (time.perf_counter() - start)
    check.wait()
    done = 1e3 * (time.perf_counter() - start)
    check.say(f"ours SFT + KD: queued in {queued:.1f} ms, done in {done:.1f} ms (as many: bound by launches)")
    return {"queued_ms": queued, "done_ms": done}


def _case(check: Check, figures: Figures, name: str, prepare: Callable[[], Callable[[], Any]]) -> None:
    """Measure one case of a suite; one that cannot run says why."""
    try:
        figures[name] = check.measure(prepare(), 5)
        floor = figures.get("three matmuls", figures[name])["ms"]
        peak = f", {figures[name]['peak_mib']:,.0f} MiB" if check.on_gpu else ""
        check.say(f"{name}: {figures[name]['ms']:.2f} ms, {figures[name]['ms'] / floor:.2f} × the first{peak}")
    except Exception as error:  # not installed, or more memory than there is
        figures[name] = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
        check.say(f"{name}: {figures[name]['error'][:160]}")
    check.free()


def step(check: Check) -> Figures:
    """A whole training step of `benchmarks/step.py`."""
    suite = importlib.import_module("step")
    shape = {"tokens": 64, "batch": 2, "hidden": 64, "layers": 2} if check.quick else {}
    shape = {"tokens": 8192, "batch": 4, "hidden": 896, "layers": 24} | shape
    options = argparse.Namespace(**shape, vocab=check.vocab, k=25, dtype="bfloat16", device=check.device)
    figures: Figures = {}
    for name in STEPS:
        _case(check, figures, name, lambda name=name: suite.SUITE.cases[name](options, False))
    for name, found in figures.items():
        if "ms" in found:
            found["tokens_per_s"] = shape["tokens"] / found["ms"] * 1e3
            check.say(f"{name}: {found['tokens_per_s']:,.0f} tokens/s")
    return figures


def capture(check: Check) -> Figures:
    """Tokens per second of a capture at every position, beside the bare forward of the same rows, at the shape of 1.5B."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from trl_reasoning_distill.teacher.head import LanguageModelHead

    width, layers, rows, length = (64, 2, 4, 32) if check.quick else (1536, 28, 64, 512)
    config = Qwen2Config(
        vocab_size=check.vocab,
        hidden_size=width,
        intermediate_size=width * 35 // 6,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 128),
        num_key_value_heads=max(1, width // 768),
        tie_word_embeddings=True,
    )
    with torch.device(check.device):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16).eval()
    ids = torch.randint(check.vocab, (rows, length), device=check.device)
    head = LanguageModelHead(model, list(range(check.vocab - 271)))

    @torch.inference_mode()
    def forward() -> list[Tensor]:
        return [model.model(input_ids=part, use_cache=False).last_hidden_state for part in ids.split(32)]

    @torch.inference_mode()
    def whole() -> list[Any]:
        return [head.records(hidden.flatten(0, 1), 25, (1.0, 2.0)) for hidden in forward()]

    figures: Figures = {}
    for name, run in (("bare forward", forward), ("capture", whole)):
        figures[name] = check.measure(run, 3)
        figures[name]["tokens_per_s"] = rows * length / figures[name]["ms"] * 1e3
        check.say(f"{name}: {figures[name]['tokens_per_s']:,.0f} tokens/s")
    return figures


def doctor(check: Check) -> Figures:
    """The doctor's prediction of memory beside what a training takes."""
    suite = importlib.import_module("doctor")
    names = ("full, bf16",) if check.quick else ("full, bf16", "full, bf16, checkpointing", "live teacher, bf16")
    figures = {}
    for name in names:
        found = figures[name] = suite.measure(suite.CASES[name], quick=check.quick)
        peaks = f"predicted {found['predicted_peak']:,.0f} MiB, measured {found['measured_peak']:,.0f} MiB"
        check.say(f"{name}: {peaks}, ratio {found['ratio']}")
    return figures


def compiled(check: Check) -> Figures:
    """`torch.compile` around the loss, at a temperature whose scalars the kernels get in float64."""
    from trl_reasoning_distill.losses.divergence import TopKTargets
    from trl_reasoning_distill.losses.fused import fused_linear_distillation_loss

    leaves = [torch.randn(rows, 64, device=check.device, requires_grad=True) for rows in (64, 1024)]
    labels = torch.randint(1024, (64,), device=check.device)
    log_probs, ids = torch.randn(64, 1024, device=check.device).log_softmax(-1).topk(5)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        teacher = TopKTargets(ids, log_probs)
        return fused_linear_distillation_loss(
            hidden * 1.5, weight, labels, teacher=teacher, kd_weight=1.0, temperature=3.0
        ).loss

    plain = torch.autograd.grad(loss(*leaves), leaves)
    start = time.perf_counter()
    got = torch.autograd.grad(torch.compile(loss)(*leaves), leaves)
    figures = {"error": max(map(relative, got, plain)), "seconds": time.perf_counter() - start}
    check.say(f"gradient {figures['error']:.1e} off, after {figures['seconds']:.0f} s")
    return figures


def main(arguments: list[str] | None = None) -> Check:
    """Run all sections; returns what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny shapes, without the tests; also on a CPU")
    parser.add_argument(
        "--json", action="store_true", help="accepted for the other benchmarks' sake: it is printed last"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/gpu_check/gpu"), help="where figures and page go")
    parser.add_argument("--seconds", type=float, default=480, help="no section begins after this (default 480)")
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="only sections whose names begin so")
    options = parser.parse_args(arguments)
    if not options.quick and not torch.cuda.is_available():
        raise SystemExit("No CUDA device is available. `--quick` runs tiny shapes on the CPU.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check = Check(device, options.quick, options.output, options.seconds)
    sections: dict[str, Callable[[Check], Figures]] = {"Machine": ceilings}
    if not check.quick:
        sections["Tests"] = tests
    sections |= {"Kernels": kernels, "Exactness": exactness}
    for width in check.widths:
        sections[f"Loss, H = {width}"] = lambda check, width=width: losses(check, width)
    sections |= {"Training step": step, "Capture": capture, "Memory": doctor}
    if check.on_gpu:
        sections["torch.compile"] = compiled
    for name, run in sections.items():
        if options.only is None or name.startswith(tuple(options.only)):
            check.section(name, run)
    check.write()
    print(json.dumps(check.figures, default=str))
    return check


if __name__ == "__main__":
    main()
