"""What is particular to the language examples: their text and labels, their losses, and the run that is rescued."""

import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from lightning.pytorch.plugins import MixedPrecision
from torch.nn import functional as F

from lightning_mixprec import MixPrecError, PrecisionPolicy
from lightning_mixprec.optim import AdamW

ROOT = Path(__file__).parent.parent.parent
CONFIGS = ROOT / "examples" / "configs"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning's of jsonargparse
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


@pytest.fixture(autouse=True)
def examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run in an empty folder, with the examples on the path, where a script has its own folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setattr(sys, "argv", ["example.py"])  # LightningCLI warns if pytest's arguments are there
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # seed_everything sets it for good
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


def fit(name: str, *arguments: str, configs: tuple[str, ...]) -> object:
    """Run a script in this process, quietly; return its CLI."""
    return module(name).main(["fit", *(f"--config={CONFIGS / config}.yaml" for config in configs), *QUIET, *arguments])


def formats(cli: object) -> dict[str, tuple[str, str | None]]:
    """Return the compute and output format of each layer."""
    return {name: (each.compute, each.output) for name, each in cli.trainer.precision_plugin.assignment.items()}


# The text


def test_the_library_s_text_is_always_the_same_and_cut_off_where_asked() -> None:
    text = module("shared.text")
    one, again = text.documents(None, 100_000), text.documents(None, 100_000)
    assert one == again
    assert sum(map(len, one)) == 100_000
    assert one[0] == Path(importlib.import_module("abc").__file__).read_bytes()


def test_windows_follow_on_each_other_and_the_last_tenth_validates(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_bytes(bytes(range(1, 101)))
    (tmp_path / "sub" / "b.txt").write_bytes(bytes(range(101, 201)))
    (tmp_path / "sub" / "picture.png").write_bytes(b"\0\1")
    data = module("shared.text").Text(str(tmp_path), context=4, ahead=1)
    train, val = data.datasets()
    assert train.dtype == torch.uint8
    assert train[:3].tolist() == [[1, 2, 3, 4, 5], [5, 6, 7, 8, 9], [9, 10, 11, 12, 13]]
    assert val.tolist()[:2] == [[91, 92, 93, 94, 95], [95, 96, 97, 98, 99]]
    assert {*range(91, 101), *range(191, 201)}.isdisjoint(train.flatten().tolist())


def test_unigram_bits_of_two_equally_frequent_bytes_are_one(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"ab" * 50_000)
    assert module("shared.text").Text(str(tmp_path)).unigram_bits == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, {"path": "/nowhere"}, r"no folder '/nowhere'.*--data\.path"),
        (b"\0", {}, r"no text files \(\*\) in .*--data\.path"),
        (b"short", {}, r"5 bytes of text.*129 bytes.*--data\.context"),
    ],
)
def test_text_that_is_not_there_is_one_line(tmp_path: Path, content: bytes | None, options: dict, message: str) -> None:
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(module("shared.data").DataError, match=message) as caught:
        module("shared.text").Text(**({"path": str(tmp_path)} | options))
    assert "\n" not in str(caught.value)


SOURCE = b'''"""A module."""

LIMIT = "# no comment"  # how many

class A:
    """A class
    of two lines."""
    # above
    def f(self): return """no docstring"""
'''


def test_the_kinds_of_a_module() -> None:
    code, comments, docstrings = module("shared.text").kinds(SOURCE)
    assert code.split() == ["LIMIT", "=", '"#', "no", 'comment"', "class", "A:", "def", "f(self):", "return"] + [
        '"""no',
        'docstring"""',
    ]
    assert comments.split() == ["how", "many", "above"]
    assert docstrings.split() == ["A", "module.", "A", "class", "of", "two", "lines."]
    assert module("shared.text").kinds(b"print 'Python 2'") == ("", "", "")


def test_snippets_are_balanced_and_no_file_is_in_both_sets(tmp_path: Path) -> None:
    for index, letter in enumerate("abcdefghij"):
        body = f'"""{letter * 40}"""\n# {letter * 40}\n{letter * 40} = 1\n'
        (tmp_path / f"{index}.py").write_text(body)
    train, val = module("shared.text").Snippets(str(tmp_path), length=20, per_kind=100).datasets()
    letters = [set("".join(map(chr, part.tensors[0].flatten().tolist()))) & set("abcdefghij") for part in (train, val)]
    assert letters == [set("bcdeghij"), set("af")]
    assert torch.bincount(val.tensors[1]).tolist() == [4, 4, 4]
    assert torch.bincount(train.tensors[1]).tolist() == [16, 16, 16]


def test_files_without_docstrings_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    with pytest.raises(module("shared.data").DataError, match=r"too little code, comments or docstrings.*--data\.path"):
        module("shared.text").Snippets(str(tmp_path)).datasets()


# The models


def test_a_decoder_sees_no_later_byte_and_an_encoder_does() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(256, (1, 12))
    changed = tokens.clone()
    changed[0, 8] = (tokens[0, 8] + 1) % 256
    for is_causal in (True, False):
        model = module("shared.text").Transformer(256, width=16, depth=2, heads=2, is_causal=is_causal)
        difference = (model(tokens) - model(changed)).abs().amax(-1)[0]
        assert (difference[:8] < 1e-6).all() == is_causal
        assert (difference[8:] > 1e-6).all()


def test_the_gpt_s_loss_is_that_of_each_next_byte() -> None:
    gpt = module("gpt").GPT(unigram_bits=1.0, width=16, depth=1, heads=2)
    tokens = torch.randint(256, (2, 6), dtype=torch.uint8)
    log_probabilities = gpt.model(tokens[:, :-1]).log_softmax(-1)
    expected = [-log_probabilities[row, i, int(tokens[row, i + 1])] for row in range(2) for i in range(5)]
    assert gpt.loss(tokens).item() == pytest.approx(sum(expected).item() / 10, rel=1e-5)
    assert abs(gpt.loss(tokens).item() - math.log(256)) < 2  # as it begins
    assert gpt.model.head.weight is gpt.model.transformer.embedding.table.weight


def test_only_hidden_bytes_are_asked_for() -> None:
    bert = module("bert")
    tokens = torch.tensor([[1, 2, 3]], dtype=torch.uint8)
    seen, answers = bert.mask(tokens, torch.tensor([[False, True, False]]))
    assert seen.tolist() == [[1, bert.MASK, 3]]
    logits = torch.randn(3, 256)
    loss = F.cross_entropy(logits, answers[0], ignore_index=bert.NO_ANSWER)
    assert torch.equal(loss, F.cross_entropy(logits[1:2], torch.tensor([2])))


SMALL = {"gpt": ["--model.width=16", "--model.depth=2", "--data.size=20000", "--data.context=16"]}
SMALL["bert"] = SMALL["gpt"]


@pytest.mark.parametrize(
    ("name", "config", "attention"),
    [("gpt", "gpt", "fp32"), ("gpt", "gpt_gpu", "bf16"), ("bert", "bert", "fp32")],
)
def test_the_configs_give_the_formats_that_they_say(name: str, config: str, attention: str) -> None:
    heads = ["--model.width=24", "--data.batch_size=4"]  # twelve heads of two features in gpt_gpu
    cli = fit(name, *SMALL[name], *heads, "--trainer.fast_dev_run=1", configs=(config,))
    found = formats(cli)
    stem, head = ("model.transformer", "model.head") if name == "gpt" else ("encoder", "head")
    assert found[""][0] == found[head][0] == "fp32"
    assert found[f"{stem}.blocks.1.attention"][0] == attention
    assert found[f"{stem}.blocks.1.attention.qkv"][0] == "bf16"
    assert found[f"{stem}.blocks.1.norm1"] == ("fp32", "input")
    assert cli.trainer.global_step == 1
    assert set(cli.model.HEADLINES) <= set(cli.trainer.callback_metrics)


def test_the_blocks_are_stored_in_bf16_where_the_config_says_so_and_their_bits_kept() -> None:
    cli = fit("gpt", *SMALL["gpt"], "--model.heads=2", "--trainer.fast_dev_run=1", configs=("gpt_bf16_weights",))
    stored = {name: each.param for name, each in cli.trainer.precision_plugin.assignment.items()}
    assert stored["model.transformer.blocks.1.attention.qkv"] == "bf16"
    assert stored["model.transformer.embedding.table"] == stored["model.transformer.blocks.0.norm1"] == "fp32"
    (optimizer,) = cli.trainer.optimizers
    assert type(optimizer) is AdamW
    assert {group["weights"] for group in optimizer.param_groups} == {"exact"}
    kept = cli.model.model.transformer.blocks[1].attention.qkv.weight
    assert kept.dtype == torch.float32  # given back with all its bits
    assert not torch.equal(kept, kept.bfloat16().float())


def test_without_a_word_on_weights_the_optimizer_is_torch_s() -> None:
    cli = fit("gpt", *SMALL["gpt"], "--model.heads=2", "--trainer.fast_dev_run=1", configs=("gpt",))
    assert [type(optimizer) for optimizer in cli.trainer.optimizers] == [torch.optim.AdamW]


def test_the_gpu_config_has_the_size_that_it_says() -> None:
    settings = yaml.safe_load((CONFIGS / "gpt_gpu.yaml").read_text())
    size = {name: settings["model"][name] for name in ("width", "depth", "heads")}
    with torch.device("meta"):
        gpt = module("gpt").GPT(unigram_bits=1.0, **size)
    assert round(sum(weight.numel() for weight in gpt.parameters()) / 1e6) == 85


def test_fine_tuning_begins_with_the_encoder_of_a_checkpoint(tmp_path: Path) -> None:
    bert = module("bert")
    size = {"width": 16, "depth": 1, "heads": 2}
    pretrained = bert.MaskedLM(**size)
    torch.save({"state_dict": pretrained.state_dict()}, tmp_path / "a.ckpt")
    classifier = bert.Classifier(encoder=str(tmp_path / "a.ckpt"), **size)
    assert all(map(torch.equal, classifier.encoder.parameters(), pretrained.encoder.parameters()))
    assert not all(map(torch.equal, bert.Classifier(**size).encoder.parameters(), pretrained.encoder.parameters()))


def test_a_checkpoint_that_does_not_fit_is_one_line(tmp_path: Path) -> None:
    bert, error = module("bert"), module("shared.data").DataError
    size = {"width": 16, "depth": 1, "heads": 2}
    with pytest.raises(error, match=r"no checkpoint '/nowhere\.ckpt'.*--model\.encoder"):
        bert.Classifier(encoder="/nowhere.ckpt", **size)
    (tmp_path / "text.ckpt").write_text("hello")
    with pytest.raises(error, match="is not a checkpoint of Lightning's"):
        bert.Classifier(encoder=str(tmp_path / "text.ckpt"), **size)
    torch.save({"state_dict": bert.MaskedLM(**size).state_dict()}, tmp_path / "a.ckpt")
    with pytest.raises(error, match=r"another encoder.*\(16,\) there and \(32,\) here.*--model\.width"):
        bert.Classifier(encoder=str(tmp_path / "a.ckpt"), width=32, depth=1, heads=2)


# The rescue


def test_the_question_s_answer_is_the_value_of_its_key() -> None:
    pairs, questions, answers = module("adaptive_rescue").Pairs().examples(50, seed=0).tensors
    for row in range(50):
        assert dict(pairs[row].tolist())[int(questions[row])] == answers[row]
    assert torch.equal(pairs, module("adaptive_rescue").Pairs().examples(50, seed=0).tensors[0])


SHORT = ["--trainer.limit_train_batches=40", "--trainer.limit_val_batches=2", "--trainer.max_epochs=1"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*overflows in fp16")
def test_fp16_dies_with_one_line_that_names_the_attention() -> None:
    with pytest.raises(MixPrecError, match="loss scale is at its minimum.*attention") as caught:
        fit("adaptive_rescue", *SHORT, configs=("rescue_fp16",))
    assert "\n" not in str(caught.value)


def test_lightning_s_own_fp16_learns_nothing() -> None:
    torch.manual_seed(0)
    rescue = module("adaptive_rescue")
    model, data = rescue.Retrieval(), rescue.Pairs(count=320)
    before = [weight.clone() for weight in model.parameters()]
    trainer = module("lightning.pytorch").Trainer(
        plugins=MixedPrecision("16-mixed", "cuda" if torch.cuda.is_available() else "cpu"),
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(model, datamodule=data)
    assert not trainer.callback_metrics["train_loss"].isfinite()
    assert all(torch.equal(old, new.cpu()) for old, new in zip(before, model.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:.*overflows in fp16")
def test_two_lines_rescue_it() -> None:
    """The seconds of a run of the size at which fp16 fails."""
    added = yaml.safe_load((CONFIGS / "rescue_adaptive.yaml").read_text())
    assert added == {"trainer": {"callbacks+": [{"class_path": "lightning_mixprec.AdaptivePrecision"}]}}
    cli = fit("adaptive_rescue", *SHORT, configs=("rescue_fp16", "rescue_adaptive"))
    found = formats(cli)
    moved = {name for name, (compute, _) in found.items() if compute != "fp16"}
    assert moved == {"model.blocks.0.attention", "model.blocks.1.attention"}
    assert {found[name][0] for name in moved} <= {"bf16", "fp32"}
    plugin = cli.trainer.precision_plugin
    assert cli.trainer.global_step + plugin.skipped_steps == 40
    assert plugin.skipped_steps < 10
    assert cli.trainer.callback_metrics["train_loss"].isfinite()
    learned = yaml.safe_load((Path(cli.trainer.log_dir) / "learned_policy.yaml").read_text())
    assert PrecisionPolicy.from_dict(learned) == plugin.policy


def test_it_is_healthy_in_fp32_and_where_nothing_has_grown() -> None:
    rescue = module("adaptive_rescue")
    torch.manual_seed(0)
    grown = rescue.GrownAttention(width=16, heads=2, growth=300.0)
    ordinary = module("shared.text").Attention(width=16, heads=2, is_causal=False)
    ordinary.load_state_dict(grown.state_dict(), strict=False)
    x = torch.randn(3, 5, 16)
    torch.testing.assert_close(grown(x), ordinary(x))
