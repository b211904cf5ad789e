"""Train a small speech recogniser with the CTC loss: log-mel features in fp32, a convolution and a GRU in bf16.

    python examples/speech.py fit --config examples/configs/speech.yaml

The speech is synthetic: the script generates "words" in which every letter is a chord of two tones, of varied pitch,
length and loudness, under noise. Any option can follow, for example

    --data.path=FOLDER                              your recordings: *.wav, and transcripts.txt of "file<TAB>text"
    --trainer.plugins=PerLayerPrecision --trainer.plugins.policy=bf16                      one format for all layers
    --trainer.precision=bf16-mixed --trainer.plugins=null              Lightning's own mixed precision, to compare
"""

import math
import wave
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningModule
from shared.common import ExampleCLI, one_cycle, run, start
from shared.data import DataError, TwoSets, read_listing
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchmetrics.text import CharErrorRate

LETTERS = "abcdefghijkl"
Utterance = tuple[Tensor, str]  # samples in [-1, 1], and what is said


def chord(letter: str, pitch: float, samples: int, sample_rate: int, random: np.random.Generator) -> np.ndarray:
    """Return a letter's two tones: one of four low frequencies and one of three high ones, faded in and out."""
    low, high = LETTERS.index(letter) % 4, LETTERS.index(letter) // 4
    time = np.arange(samples) / sample_rate
    tones = [
        np.sin(2 * np.pi * frequency * pitch * time + random.uniform(0, 2 * np.pi))
        for frequency in (350 * 1.25**low, 1200 * 1.25**high)
    ]
    return sum(tones) * np.hanning(samples) ** 0.25


def synthesise(count: int, seed: int, sample_rate: int = 8000) -> list[Utterance]:
    """Return utterances of three to seven letters, the same for the same seed."""
    random = np.random.default_rng(seed)
    utterances = []
    for _ in range(count):
        text = "".join(random.choice(list(LETTERS), random.integers(3, 8)))
        pitch, parts = random.uniform(0.92, 1.08), []  # a neighbour in frequency is 1.25 times as high
        for letter in text:
            sound, gap = (random.uniform(*seconds) * sample_rate for seconds in ((0.06, 0.14), (0.02, 0.05)))
            parts += [chord(letter, pitch, int(sound), sample_rate, random), np.zeros(int(gap))]
        samples = np.concatenate(parts)
        samples = samples * random.uniform(0.05, 0.3) + random.normal(0, random.uniform(0.02, 0.12), len(samples))
        utterances.append((torch.tensor(samples, dtype=torch.float32).clamp(-1, 1), text))
    return utterances


def read_wav(path: Path) -> tuple[Tensor, int]:
    """Return the samples in [-1, 1], channels averaged, and the sample rate of a file of 16-bit PCM."""
    try:
        with wave.open(str(path)) as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            data = file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise DataError(f"cannot read {str(path)!r} as a wav file: {error}; write it as 16-bit PCM") from error
    if width != 2:
        raise DataError(f"{str(path)!r} has {8 * width} bits per sample; write it as 16-bit PCM")
    samples = np.frombuffer(data, dtype="<i2").reshape(-1, channels).mean(1) / 32768
    return torch.tensor(samples, dtype=torch.float32), rate


def read_recordings(folder: Path) -> tuple[list[Utterance], int]:
    """Return all utterances that ``transcripts.txt`` lists, and their sample rate in Hz."""
    utterances, rates = [], {}
    for path, text in read_listing(folder, "transcripts.txt", "text"):
        samples, rate = read_wav(path)
        utterances.append((samples, text))
        rates.setdefault(rate, path.name)
    if len(rates) > 1:
        found = ", ".join(f"{rate} Hz in {name}" for rate, name in rates.items())
        raise DataError(f"the recordings in {str(folder)!r} have several sample rates ({found}); resample them to one")
    return utterances, next(iter(rates))


class Speech(TwoSets):
    """Synthetic words that the script generates, or recordings from your disk.

    Args:
        path: a folder of 16-bit wav files with ``transcripts.txt``, lines of ``file<TAB>text``; every tenth line
            validates. Without it 1600 synthetic words train and 200 others validate.
        batch_size: utterances per step and device.
        num_workers: 0, since the utterances lie in memory.

    Attributes:
        alphabet: the characters that occur.
        sample_rate: samples per second.

    Raises:
        DataError: a file is missing or cannot be used.
    """

    drops_last = False

    def __init__(self, path: str | None = None, batch_size: int = 32, num_workers: int = 0) -> None:
        super().__init__(batch_size, num_workers)
        if path is None:
            self.train_set, self.val_set = synthesise(1600, seed=0), synthesise(200, seed=1)
            self.sample_rate = 8000
        else:
            utterances, self.sample_rate = read_recordings(Path(path).expanduser())
            self.val_set = utterances[::10]
            self.train_set = [each for place, each in enumerate(utterances) if place % 10]
        self.alphabet = "".join(sorted({letter for _, text in self.train_set + self.val_set for letter in text}))

    def collate(self, utterances: list[Utterance]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return padded samples and their lengths, padded labels and theirs; label 0 is the blank of CTC."""
        waves = [samples for samples, _ in utterances]
        labels = [torch.tensor([1 + self.alphabet.index(letter) for letter in text]) for _, text in utterances]
        samples, counts = (torch.tensor([len(row) for row in rows]) for rows in (waves, labels))
        return pad_sequence(waves, batch_first=True), samples, pad_sequence(labels, batch_first=True), counts


class LogMel(nn.Module):
    """The logarithm of the power in bands of equal width on the mel scale, in windows of 25 ms every 10 ms."""

    def __init__(self, sample_rate: int, bands: int) -> None:
        super().__init__()
        self.hop, window = sample_rate // 100, sample_rate // 40
        self.fft_size = 2 ** math.ceil(math.log2(window))
        self.register_buffer("window", torch.hann_window(window), persistent=False)
        self.register_buffer("bands", mel_bands(sample_rate, self.fft_size, bands), persistent=False)

    def forward(self, waves: Tensor) -> Tensor:
        """Return (batch, bands, 1 + samples // hop) of (batch, samples)."""
        spectrum = torch.stft(
            waves, self.fft_size, self.hop, len(self.window), self.window, pad_mode="constant", return_complex=True
        )
        return (self.bands @ spectrum.abs().square() + 1e-5).log()


def mel_bands(sample_rate: int, fft_size: int, bands: int) -> Tensor:
    """Return the weights (bands, 1 + fft_size // 2) of triangles, equally spaced on mel = log(1 + Hz / 700)."""
    edges = 700 * torch.linspace(0, math.log1p(sample_rate / 1400), bands + 2).expm1()
    frequencies = torch.linspace(0, sample_rate / 2, 1 + fft_size // 2)
    left, centre, right = (edges[start : start + bands, None] for start in range(3))
    rising, falling = (frequencies - left) / (centre - left), (right - frequencies) / (right - centre)
    return torch.minimum(rising, falling).clamp(min=0)


class Listener(nn.Module):
    """Log-mel features, a convolution that halves the frame rate, a GRU in both directions and a linear head."""

    def __init__(self, sample_rate: int, labels: int, bands: int, width: int) -> None:
        super().__init__()
        self.features = LogMel(sample_rate, bands)
        self.conv = nn.Conv1d(bands, width, kernel_size=5, stride=2, padding=2)
        self.norm = nn.LayerNorm(width)
        self.gru = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * width, labels)

    def forward(self, waves: Tensor) -> Tensor:
        """Return the logits (batch, frames, labels) of (batch, samples)."""
        frames = self.conv(self.features(waves)).transpose(1, 2)
        return self.head(self.gru(self.norm(frames).relu())[0])

    def frames(self, samples: Tensor) -> Tensor:
        """Return how many frames of the logits belong to so many samples."""
        return (samples // self.features.hop) // 2 + 1


class SpeechRecognizer(LightningModule):
    """A ``Listener`` trained with the CTC loss by AdamW and one cycle of the learning rate.

    Args:
        alphabet: the characters that occur; the CLI asks the data.
        sample_rate: samples per second; the CLI asks the data.
        bands: mel bands of the features.
        width: channels of the convolution and units of the GRU.
        learning_rate: peak of the cycle.
    """

    FROM_DATA = ("alphabet", "sample_rate")
    EXPECT = "a character error rate below 1 % after 12 epochs, a minute on two CPU cores"
    HEADLINES = {"val_cer": ("character error rate", ".2%")}

    def __init__(
        self, alphabet: str, sample_rate: int, bands: int = 40, width: int = 96, learning_rate: float = 5e-3
    ) -> None:
        super().__init__()
        self.model = Listener(sample_rate, 1 + len(alphabet), bands, width)
        self.alphabet, self.learning_rate = alphabet, learning_rate
        self.val_cer = CharErrorRate()

    def loss(self, logits: Tensor, batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        """Return minus the log-probability of the labels per label, summed over all ways to align them."""
        _, samples, labels, label_counts = batch
        log_probs = logits.log_softmax(-1).transpose(0, 1)
        # zero_infinity: a text with more letters than its recording has frames teaches nothing.
        return nn.functional.ctc_loss(log_probs, labels, self.model.frames(samples), label_counts, zero_infinity=True)

    def forward(self, waves: Tensor) -> Tensor:
        """Return the logits of each label at each time."""
        return self.model(waves)

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        loss = self.loss(self.model(batch[0]), batch)
        self.log("train_loss", loss, batch_size=len(batch[0]))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor, Tensor], batch_idx: int) -> None:
        """Measure the loss, and the edits between the most likely labels and the text, per character of the text."""
        waves, samples, labels, label_counts = batch
        logits = self.model(waves)
        self.val_cer(self.decode(logits, self.model.frames(samples)), self.texts(labels, label_counts))
        self.log("val_loss", self.loss(logits, batch), prog_bar=True, batch_size=len(waves), sync_dist=True)
        self.log("val_cer", self.val_cer, prog_bar=True, batch_size=len(waves))

    def decode(self, logits: Tensor, frames: Tensor) -> list[str]:
        """Return the texts of the most likely label of each frame: repeats become one, then blanks go."""
        best = zip(logits.argmax(-1).cpu(), frames.tolist(), strict=True)
        return [self.text(labels[:count].unique_consecutive()) for labels, count in best]

    def texts(self, labels: Tensor, counts: Tensor) -> list[str]:
        """Return the texts of padded labels."""
        return [self.text(row[:count]) for row, count in zip(labels.cpu(), counts.tolist(), strict=True)]

    def text(self, labels: Tensor) -> str:
        """Return the characters of labels without the blanks."""
        return "".join(self.alphabet[label - 1] for label in labels.tolist() if label)

    def configure_optimizers(self) -> dict:
        """Return AdamW and a schedule that moves with every optimizer step."""
        optimizer = torch.optim.AdamW(self.parameters(), self.learning_rate)
        return one_cycle(self, optimizer, self.learning_rate)


def main(args: Sequence[str] | None = None) -> ExampleCLI:
    """Run what the command line, or ``args``, asks for."""
    return run(SpeechRecognizer, Speech, args)


if __name__ == "__main__":
    start(main)
