"""Look into a Top-K store, and check it.

    trl-distill store inspect runs/x/capture       what is in it, and what made it
    trl-distill store verify runs/x/capture        is every byte and every row right?
    trl-distill store audit runs/x/capture         let the teacher read some rows again, and compare

`audit` prints the divergence between teacher and store in nats, the mass of the K most likely tokens, and bytes per position;
`--plot audit.png` draws them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from trl_reasoning_distill.options import Count, Options, option
from trl_reasoning_distill.scripts.command import Command
from trl_reasoning_distill.scripts.stage import command_main, parse_stage, parser_of

if TYPE_CHECKING:
    from trl_reasoning_distill.teacher.store import TopKStore


@dataclass(kw_only=True)
class StoreArguments(Options):
    """Which store, and what to do with it."""

    action: Literal["inspect", "verify", "audit"] = option(
        "inspect", "inspect, verify or audit; also as the first word."
    )
    path: str = option(help="The store, or the folder of its stage; also as the second word.")
    num_rows: Count = option(64, "[audit] Rows that the teacher reads again.")
    teacher: str | None = option(
        None, "[audit] Folder or hub name of the teacher. Default: the one that the store names."
    )
    chat_template_path: str | None = option(
        None, "[audit] Chat template of the capture, if it was not the teacher's own."
    )
    base_url: str | None = option(
        None, "[audit] Server of the teacher, for a store that was captured from one. Default: $OPENAI_BASE_URL."
    )
    api_key_env: str = option("OPENAI_API_KEY", "[audit] Environment variable that holds the server's key.")
    plot: str | None = option(None, "[audit] File for a plot, such as audit.png.")
    dry_run: bool = option(False, "[audit] List which rows the teacher would read again, show two, and stop.")
    trust_remote_code: bool = option(False, "[audit] Run code that comes with a hub model. Off unless you trust it.")


make_parser = parser_of(StoreArguments)


@command_main
def main(command: Command) -> None:
    """Run the command; the first words may stand without `--action` and `--path`."""
    (options,) = parse_stage(make_parser(), command)

    from trl_reasoning_distill.teacher.store import TopKStore

    store = TopKStore.open(options.path)
    if options.action == "inspect":
        _inspect(store)
    elif options.action == "verify":
        for line in store.verify():
            print(f"right: {line}")
        print(f"store: every byte of {store.path} is right")
    else:
        _audit(store, options)


def _inspect(store: TopKStore) -> None:
    manifest, fingerprint = store.manifest, store.fingerprint
    size = sum(entry["bytes"] for entry in manifest["shards"])
    print(f"{store.path}: {len(store):,} positions of {store.rows:,} rows ({manifest['tokens']:,} tokens)")
    print(
        f"  Top-{store.top_k} at T = {', '.join(f'{t:g}' for t in store.temperatures)}, {manifest['encoding']} · "
        f"{size:,} bytes in {len(manifest['shards'])} shards ({size / max(1, len(store)):.1f} per position) + "
        f"{manifest['rows_file']['bytes']:,} bytes of rows"
    )
    for name, value in fingerprint.items():
        if name != "temperatures":
            print(f"  {name}: {value}")
    if manifest["aligned_to"]:
        print("  aligned to:")
        for name, value in manifest["aligned_to"].items():
            print(f"    {name}: {value}")


def _audit(store: TopKStore, options: StoreArguments) -> None:
    from trl_reasoning_distill.data.examples import describe_examples
    from trl_reasoning_distill.scripts.arguments import ReaderArguments
    from trl_reasoning_distill.teacher.audit import audit_store, plot_audit, sample_of

    made_with = store.fingerprint
    from_server = made_with.get("engine") == "openai" and options.teacher is None
    names = () if from_server else ("dtype", "quantization", "attn_implementation", "max_batch_tokens")
    arguments = ReaderArguments(
        engine="openai" if from_server else "transformers",
        teacher_tokenizer=options.teacher or store.tokenizer_name,
        base_url=options.base_url,
        api_key_env=options.api_key_env,
        trust_remote_code=options.trust_remote_code,
        **{name: made_with[name] for name in names if name in made_with},
    )
    teacher = options.teacher or made_with["teacher"]
    tokenizer = arguments.load_tokenizer(teacher, options.chat_template_path)
    if options.dry_run:
        numbers = sample_of(store, options.num_rows)
        rows = [store.row(number) for number in numbers]
        read, positions = sum(len(row.input_ids) for row in rows), sum(row.count for row in rows)
        print(
            f"audit: {teacher} would read {len(rows):,} of {store.rows:,} rows again, {read:,} tokens, and {positions:,} records be compared"
        )
        print(describe_examples([{"input_ids": r.input_ids.tolist(), "labels": r.labels} for r in rows[:2]], tokenizer))
        return
    reader = arguments.make_reader(teacher, tokenizer, store.top_k, store.temperatures)
    audit = audit_store(store, reader, tokenizer, num_rows=options.num_rows)
    print(f"read again: {audit.rows} rows, {audit.positions:,} positions")
    print(
        f"KL(teacher ‖ stored): mean {audit.kl.mean():.2e}, 99 % below {_percentile(audit.kl):.2e}, worst {audit.kl.max():.2e} nats"
    )
    print("mass of the Top-K: " + ", ".join(f"K = {k}: {mass:.4f}" for k, mass in audit.coverage.items()))
    print(
        f"most likely token is the stored one: {audit.same_top1:.2%} · {audit.bytes_per_position:.1f} bytes per position"
    )
    if options.plot:
        plot_audit(audit, options.plot)
        print(f"plot: {options.plot}")


def _percentile(values: Any) -> float:
    import numpy as np

    return float(np.percentile(values, 99))


if __name__ == "__main__":
    main()
