"""Speech, click logs and image-text pairs: the data are right, so are the losses, and the configs give the formats."""

import importlib
import itertools
import math
import sys
import wave
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from PIL import Image
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from lightning_mixprec import PrecisionPolicy

ROOT = Path(__file__).parent.parent.parent
CONFIGS = ROOT / "examples" / "configs"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning's of jsonargparse


@pytest.fixture(scope="module")
def examples() -> Iterator[None]:
    """Put the examples on the path, where a script has its own folder."""
    sys.path.insert(0, str(ROOT / "examples"))
    yield
    sys.path.remove(str(ROOT / "examples"))


@pytest.fixture
def load(examples: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.setattr(sys, "argv", ["example.py"])  # LightningCLI warns if pytest's arguments are there
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # seed_everything sets it for good
    return importlib.import_module


@pytest.fixture
def speech(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("speech")


@pytest.fixture
def recommendation(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("recommendation")


@pytest.fixture
def contrastive(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("contrastive")


def formats(name: str, model: torch.nn.Module) -> dict[str, tuple[str, str, str | None]]:
    """Return what each layer gets, as param, compute and output, under the policy of a config."""
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assignment = PrecisionPolicy.from_dict(config["trainer"]["plugins"]["init_args"]["policy"]).resolve(model)
    return {layer: (given.param, given.compute, given.output) for layer, given in assignment.items()}


def line(data: type, path: object) -> str:
    """Return the one line that says why data cannot be used."""
    with pytest.raises(importlib.import_module("shared.data").DataError) as raised:
        data(str(path))
    assert "\n" not in str(raised.value)
    return str(raised.value)


def one_step(script: ModuleType, *arguments: str) -> Trainer:
    """Return the trainer after one step on the command line's data, without plugins or callbacks."""
    return script.main(["fit", "--trainer.fast_dev_run=1", "--trainer.enable_progress_bar=false", *arguments]).trainer


# Speech


def write_wav(path: Path, samples: np.ndarray, rate: int = 8000, width: int = 2) -> None:
    """Write (samples, channels) of integers."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(samples.astype({1: "u1", 2: "<i2"}[width]).tobytes())


def recordings(folder: Path, count: int = 11, **options: int) -> Path:
    texts = [("ab", "b a")[place % 2] for place in range(count)]
    for place in range(count):
        write_wav(folder / f"{place}.wav", np.full((4000, 2), 100 * place), **options)
    (folder / "transcripts.txt").write_text("".join(f"{place}.wav\t{text}\n" for place, text in enumerate(texts)))
    return folder


def test_words_are_the_same_for_the_same_seed(speech: ModuleType) -> None:
    first, again, other = (speech.synthesise(5, seed) for seed in (3, 3, 4))
    assert [text for _, text in first] == [text for _, text in again] != [text for _, text in other]
    assert all(torch.equal(one, two) for (one, _), (two, _) in zip(first, again, strict=True))
    assert all(3 <= len(text) <= 7 and samples.abs().max() <= 1 for samples, text in first)


def test_every_letter_has_its_own_two_tones(speech: ModuleType) -> None:
    peaks = set()
    for letter in speech.LETTERS:
        power = np.abs(np.fft.rfft(speech.chord(letter, 1.0, 8000, 8000, np.random.default_rng(0))))  # 1 Hz per bin
        peaks.add((int(power[:1000].argmax()), 1000 + int(power[1000:].argmax())))
    assert len(peaks) == len(speech.LETTERS)
    assert (350, 1200) in peaks


@pytest.mark.parametrize("rate", [8000, 16000])
def test_a_tone_lands_in_the_band_around_it(speech: ModuleType, rate: int) -> None:
    features = speech.LogMel(rate, bands=40)
    tone = torch.sin(2 * math.pi * 1000 * torch.arange(rate) / rate)
    mel = math.log(1 + 1000 / 700) / math.log(1 + rate / 1400) * 41 - 1  # 41 steps between the edges of 40 bands
    assert abs(features(tone[None]).mean(2).argmax().item() - mel) <= 1


@pytest.mark.parametrize("samples", [1, 79, 80, 159, 160, 161, 4000, 4081])
def test_a_recording_has_the_frames_that_the_loss_is_told(speech: ModuleType, samples: int) -> None:
    model = speech.Listener(8000, labels=3, bands=8, width=4)
    assert model(torch.zeros(1, samples)).shape == (1, int(model.frames(torch.tensor(samples))), 3)


def collapse(path: tuple[int, ...]) -> list[int]:
    return [label for label, _ in itertools.groupby(path) if label]


@pytest.mark.parametrize("labels", [[1], [1, 2], [2, 2]])
def test_the_loss_sums_over_all_ways_to_align_a_text(speech: ModuleType, labels: list[int]) -> None:
    model = speech.SpeechRecognizer("ab", 8000)
    samples = torch.tensor([7 * 80])  # four frames
    logits = torch.randn(1, 4, 3)
    batch = (torch.zeros(1, 560), samples, torch.tensor([labels]), torch.tensor([len(labels)]))
    probabilities = logits.double().softmax(-1)[0]
    ways = [path for path in itertools.product(range(3), repeat=4) if collapse(path) == labels]
    total = sum(math.prod(probabilities[frame, label].item() for frame, label in enumerate(path)) for path in ways)
    assert model.loss(logits, batch).item() == pytest.approx(-math.log(total) / len(labels), rel=1e-5)


def test_decoding_merges_repeats_then_drops_blanks_and_padding(speech: ModuleType) -> None:
    labels = torch.tensor([[1, 1, 0, 1, 2, 2, 0, 2]])
    logits = torch.nn.functional.one_hot(labels, 3).float()
    assert speech.SpeechRecognizer("ab", 8000).decode(logits, torch.tensor([6])) == ["aab"]


def test_recordings_from_disk(speech: ModuleType, tmp_path: Path) -> None:
    data = speech.Speech(str(recordings(tmp_path, rate=16000)))
    assert (data.alphabet, data.sample_rate) == (" ab", 16000)
    assert (len(data.train_set), len(data.val_set)) == (9, 2)
    samples, text = data.train_set[0]
    assert text == "b a"
    assert torch.equal(samples, torch.full((4000,), 100 / 32768))
    waves, lengths, labels, counts = data.collate([data.train_set[0], (torch.ones(2), "ab")])
    assert waves.shape == (2, 4000)
    assert (lengths.tolist(), labels.tolist(), counts.tolist()) == ([4000, 2], [[3, 1, 2], [2, 3, 0]], [3, 2])
    assert one_step(speech, f"--data.path={tmp_path}").global_step == 1


def test_recordings_that_cannot_be_used_are_one_line(speech: ModuleType, tmp_path: Path) -> None:
    assert "no file 'transcripts.txt' in '/nowhere'" in line(speech.Speech, "/nowhere")
    folder = recordings(tmp_path)
    write_wav(folder / "3.wav", np.zeros((400, 1)), rate=16000)
    assert "8000 Hz in 0.wav, 16000 Hz in 3.wav" in line(speech.Speech, folder)
    write_wav(folder / "2.wav", np.zeros((400, 1)), width=1)
    assert "8 bits per sample" in line(speech.Speech, folder)
    (folder / "1.wav").write_text("no sound")
    assert "1.wav' as a wav file" in line(speech.Speech, folder)
    (folder / "transcripts.txt").write_text("0.wav ab\n")
    assert "line 1 of " in line(speech.Speech, folder)
    (folder / "transcripts.txt").write_bytes("0.wav\té\n".encode("latin-1"))
    assert "is no UTF-8 text" in line(speech.Speech, folder)


def test_features_logits_and_loss_of_speech_are_fp32(speech: ModuleType) -> None:
    found = formats("speech", speech.SpeechRecognizer("ab", 8000))
    assert {found[name][1] for name in ("model.features", "model.head", "")} == {"fp32"}
    assert {found[name][1] for name in ("model", "model.conv", "model.gru")} == {"bf16"}
    assert found["model.norm"] == ("fp32", "fp32", "input")


# Click logs


def test_clicks_are_the_same_and_follow_from_the_row(recommendation: ModuleType) -> None:
    (rows, probability), (again, _) = recommendation.click_log(20_000), recommendation.click_log(20_000)
    assert all(torch.equal(one, two) for one, two in zip(rows, again, strict=True))
    counts, numbers, clicks = rows
    assert counts.shape == (20_000, 13)
    assert numbers.shape == (20_000, 26)
    assert binary_auroc(probability, clicks.long()) > 0.85
    assert abs(probability.mean() - clicks.double().mean()) < 0.02
    seen = torch.bincount(numbers[:, -1])
    assert seen[0] > 1000 > 10 > seen[seen > 0].median()  # one value is everywhere, most are rare


def test_the_interaction_is_each_product_once(recommendation: ModuleType) -> None:
    vectors = torch.randn(2, 4, 3)
    expected = [(vectors[:, i] * vectors[:, j]).sum(1) for i, j in itertools.combinations(range(4), 2)]
    torch.testing.assert_close(recommendation.Interaction()(vectors), torch.stack(expected, 1))


def test_a_step_moves_the_rows_of_the_batch_alone(recommendation: ModuleType) -> None:
    model = recommendation.ClickModel(table_rows=10)
    places = 10 * torch.arange(26).repeat(2, 1) + torch.tensor([[1], [4]])
    before = model.model.table.weight.detach().clone()
    optimizer = model.configure_optimizers()
    model.model(torch.rand(2, 13), places).sum().backward()
    assert model.model.table.weight.grad.is_sparse
    optimizer.step()
    moved = (model.model.table.weight != before).any(1).nonzero().flatten()
    assert torch.equal(moved, places.flatten().sort().values)


ROW = ["1", *("3" for _ in range(13)), *("68fd1e64" for _ in range(26))]


def tsv(path: Path, rows: list[list[str]]) -> Path:
    path.write_text("".join("\t".join(row) + "\n" for row in rows))
    return path


def test_rows_of_criteo_from_disk(recommendation: ModuleType, tmp_path: Path) -> None:
    sparse = ["0", "", "-1", *ROW[3:-1], ""]
    path = tsv(tmp_path / "train.txt", [ROW, sparse] * 15)
    data = recommendation.Clicks(str(path), limit=20, table_rows=7)
    assert (len(data.train_set), len(data.val_set)) == (18, 2)
    (counts, places, click), (other_counts, other_places, other_click) = data.train_set[0], data.train_set[1]
    assert (click.item(), other_click.item()) == (1, 0)
    assert counts.tolist() == pytest.approx([math.log(4)] * 13)
    assert other_counts[:3].tolist() == pytest.approx([0, 0, math.log(4)])  # missing and negative counts are zero
    assert places.tolist() == [zlib.crc32(b"68fd1e64") % 7 + 7 * field for field in range(26)]
    assert other_places[-1] == 7 * 25  # a missing category is row 0
    assert one_step(recommendation, f"--data.path={path}", "--data.table_rows=7").global_step == 1


def test_rows_that_cannot_be_used_are_one_line(recommendation: ModuleType, tmp_path: Path) -> None:
    def of(rows: list[list[str]]) -> str:
        return line(recommendation.Clicks, tsv(tmp_path / "rows.txt", rows))

    assert "no click log '/nowhere'" in line(recommendation.Clicks, "/nowhere")
    assert "line 2 of " in of([ROW, ROW[:-1]])
    assert "39 columns" in of([ROW, ROW[:-1]])
    assert "the label '7'" in of([["7", *ROW[1:]]])
    assert "'x'" in of([["1", "x", *ROW[2:]]])
    assert "gave 9 rows" in of([ROW] * 9)


def test_table_and_logits_of_clicks_are_fp32(recommendation: ModuleType) -> None:
    found = formats("recommendation", recommendation.ClickModel(10))
    assert found["model.table"][:2] == ("fp32", "fp32")
    assert found["model.head"][1] == "fp32"
    assert {found[name][1] for name in ("model.bottom.0", "model.interaction", "model.top.2", "")} == {"bf16"}


# Image-text pairs


def decoded(row: Tensor) -> str:
    return bytes(code - 1 for code in row.tolist() if code).decode()


def test_tokens_are_the_bytes_and_filling(contrastive: ModuleType) -> None:
    rows = contrastive.tokens(["seven", "sieben f\u00fcnf", "a long one"], length=11)
    assert rows.shape == (3, 11)
    assert decoded(rows[0]) == "seven"
    assert decoded(rows[1]) == "sieben f\u00fcn"  # cut after eleven bytes
    assert rows[0].count_nonzero() == 5


def test_every_caption_names_its_digit_and_the_candidates_are_worded_anew(contrastive: ModuleType) -> None:
    data = contrastive.ImageTexts()
    captions = set()
    for image, text, digit in itertools.islice(data.train_set, 200):
        captions.add(decoded(text))
        assert contrastive.NAMES[digit] in decoded(text)
        assert image.shape == (3, 8, 8)
    assert len(captions) > 40
    assert captions.isdisjoint(data.candidates)
    assert all(name in text for name, text in zip(contrastive.NAMES, data.candidates, strict=True))
    assert max(len(text) for text in captions | set(data.candidates)) <= data.text_length  # none is cut


def test_the_loss_takes_all_that_mean_the_same_as_right(contrastive: ModuleType) -> None:
    model = contrastive.Contrastive(["one", "two"], 8)
    model.log = lambda *_, **__: None
    images, texts = torch.randn(4, 3, 8, 8), contrastive.tokens(["one", "a two", "1", "ten"], 8)
    meanings = [1, 2, 1, 10]
    loss = model.training_step((images, texts, torch.tensor(meanings)), 0)
    with torch.no_grad():
        a, b = model.image_encoder(images).double(), model.text_encoder(texts).double()
    cosines = (a / a.norm(dim=1, keepdim=True)) @ (b / b.norm(dim=1, keepdim=True)).T
    expected = []
    for logits in (14 * cosines, 14 * cosines.T):
        for row, meaning in zip(logits, meanings, strict=True):
            right = [place for place, other in enumerate(meanings) if other == meaning]
            expected.append((torch.logsumexp(row, 0) - row[right].mean()).item())
    assert loss.item() == pytest.approx(np.mean(expected), rel=1e-5)


def test_the_scale_of_the_similarity_ends_at_100(contrastive: ModuleType) -> None:
    similarity = contrastive.Similarity(200.0)
    vectors = torch.randn(3, 5)
    assert similarity(vectors, 7 * vectors).diag().tolist() == pytest.approx([100] * 3)


def test_a_scale_at_100_may_fall_again_and_not_rise(contrastive: ModuleType) -> None:
    model = contrastive.Contrastive(["one", "two"], 8, scale=100.0)
    log_scale = model.similarity.log_scale
    model.similarity(torch.randn(3, 5), torch.randn(3, 5)).sum().backward()
    assert log_scale.grad != 0
    for step, expected in ((0.5, 100.0), (-0.5, 100 / math.exp(0.5))):
        with torch.no_grad():
            log_scale += step
        model.on_train_batch_end(None, None, 0)
        assert log_scale.exp().item() == pytest.approx(expected)


def test_filling_does_not_change_what_a_text_is(contrastive: ModuleType) -> None:
    encoder = contrastive.TextEncoder(16, width=8, size=4)
    short = contrastive.TextEncoder(4, width=8, size=4)
    short.load_state_dict(encoder.state_dict() | {"place": encoder.place[:4]})
    texts = ["nine", "one"]
    torch.testing.assert_close(encoder(contrastive.tokens(texts, 16)), short(contrastive.tokens(texts, 4)))


def pairs(folder: Path, count: int = 12) -> Path:
    for place in range(count):
        Image.new("RGB", (40, 30), (20 * place, 0, 0)).save(folder / f"{place}.png")
    captions = "".join(f"{place}.png\tshade {place % 4}\n" for place in range(count))
    (folder / "captions.txt").write_text(captions)
    return folder


def test_pairs_from_disk(contrastive: ModuleType, tmp_path: Path) -> None:
    data = contrastive.ImageTexts(str(pairs(tmp_path)), size=16)
    assert data.candidates == ["shade 0", "shade 2"]  # of images 0 and 10
    assert [int(number) for _, number in data.val_set] == [0, 1]
    image, text, number = data.train_set[0]
    assert image.shape == (3, 16, 16)
    assert (decoded(text), int(number)) == ("shade 1", 1)
    assert len(data.train_set) == 10
    assert one_step(contrastive, f"--data.path={tmp_path}", "--data.size=16").global_step == 1


def test_pairs_that_cannot_be_used_are_one_line(contrastive: ModuleType, tmp_path: Path) -> None:
    assert "no file 'captions.txt' in '/nowhere'" in line(contrastive.ImageTexts, "/nowhere")
    folder = pairs(tmp_path)
    (folder / "1.png").write_text("no image")
    assert "1.png" in line(contrastive.ImageTexts, folder)
    (folder / "captions.txt").write_text("0.png shade\n")
    assert "'file<TAB>caption'" in line(contrastive.ImageTexts, folder)
    (tmp_path / "few").mkdir()
    few = pairs(tmp_path / "few")
    (few / "captions.txt").write_text("".join((few / "captions.txt").read_text().splitlines(keepends=True)[:6]))
    assert "have 1 caption; list at least eleven" in line(contrastive.ImageTexts, few)


def test_similarity_and_softmax_of_pairs_are_fp32(contrastive: ModuleType) -> None:
    found = formats("contrastive", contrastive.Contrastive(["one", "two"], 8))
    assert {found[name][1] for name in ("similarity", "")} == {"fp32"}
    assert {found[name][1] for name in ("image_encoder.0", "text_encoder", "text_encoder.project")} == {"bf16"}
    assert found["text_encoder.norm"] == ("fp32", "fp32", "input")
