"""Sound as Whisper hears it: WAV files, 16 000 samples a second, log-mel windows of 30 seconds. numpy only.

Follows Radford et al. 2022, sec. 2.2, and its released constants: frames of 400 samples every 160 under a Hann window, 80 bands on
Slaney's mel scale (Auditory Toolbox, 1998) with triangles of equal area, log10 within 8 of a window's loudest band, shifted and scaled
to about (-1, 1).
"""

from __future__ import annotations

import math
import wave
from functools import cache
from pathlib import Path

import numpy as np

from tokeff.errors import UserError

RATE = 16_000  # samples a second
FRAME, HOP = 400, 160  # samples
WINDOW = 30  # seconds
MAX_BYTES = 1 << 30  # of a sound file


def read_wav(path: str | Path) -> np.ndarray:
    """float32 samples in [-1, 1] at `RATE`, channels averaged. UserError for anything but a WAV file of 16-bit samples."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path} is larger than {MAX_BYTES >> 30} GiB; cut it into pieces")
        with wave.open(str(path), "rb") as file:
            channels, width, rate = file.getnchannels(), file.getsampwidth(), file.getframerate()
            if width != 2 or channels < 1 or not 1000 <= rate <= 400_000:
                raise UserError(f"{path} has {channels} channels of {8 * width} bits at {rate} Hz; give 16-bit samples at 1 to 400 kHz")
            raw = file.readframes(file.getnframes())
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}") from None
    except (wave.Error, EOFError) as e:
        raise UserError(f"{path} is not a WAV file of plain samples ({e or 'it ends too early'}); convert it") from None
    samples = np.frombuffer(raw, "<i2", len(raw) // (2 * channels) * channels)
    return resample(samples.reshape(-1, channels).mean(axis=1) / 32768, rate)


def resample(x: np.ndarray, rate: int, to: int = RATE, lobes: int = 32) -> np.ndarray:
    """float32 samples of x at another rate, through a sinc low-pass under a Kaiser window of `lobes` zero crossings on each side."""
    up, down = to // math.gcd(to, rate), rate // math.gcd(to, rate)
    if up == down:
        return x.astype(np.float32)
    wide = max(up, down)
    t = np.arange(-lobes * wide, lobes * wide + 1)
    taps = np.sinc(t / wide) * np.kaiser(len(t), 9.0) * (up / wide)
    at = np.arange(-(-len(x) * up // down)) * down + lobes * wide  # in the samples of the higher rate, taps included
    y = np.zeros(len(at))
    for phase in range(up):  # the taps that meet samples of x, for the outputs that share them
        mine = at % up == phase
        some = taps[phase::up]
        y[mine] = np.convolve(x, some)[at[mine] // up]
    return y.astype(np.float32)


def check_sound(x: np.ndarray) -> None:
    """UserError for what has nothing to hear in it: no samples, or all of them the same."""
    if x.ndim != 1:
        raise UserError(f"sound of shape {x.shape} is no row of samples; average its channels first, as read_wav does")
    if not len(x):
        raise UserError(f"a sound has no samples; give at least one frame of {FRAME} at {RATE} Hz, or leave it out")
    if not np.isfinite(x).all():
        raise UserError("the sound holds samples that are no numbers; read it again")
    if x.min() == x.max():
        raise UserError(f"a sound of {len(x)} samples is silent; leave it out, or look whether the right channel was read")


def windows(x: np.ndarray, seconds: float = WINDOW, search: float = 5.0) -> list[np.ndarray]:
    """x in pieces of at most `seconds`, each cut at the quietest tenth of a second within the last `search` seconds it may have (at most
    half of them). Raises UserError as `check_sound`; a piece of a longer sound may be silent."""
    check_sound(x)
    most, pieces = int(seconds * RATE), []
    step = min(RATE // 10, most // 4)
    while len(x) > most:
        first = most - min(int(search * RATE), most // 2)
        loud = [np.square(x[i : i + step]).sum() for i in range(first, most - step + 1, step // 2)]
        cut = first + int(np.argmin(loud)) * (step // 2) + step // 2
        pieces.append(x[:cut])
        x = x[cut:]
    return [*pieces, x]


@cache
def mel_filters(bands: int = 80) -> np.ndarray:
    """weight_IF of each band over the frequencies of a frame: triangles between equal steps on Slaney's mel scale, each of area 1.

    The scale is linear up to 1000 Hz (15 mel) and logarithmic above, where 27 mel are a factor of 6.4.
    """
    step, knee = 200 / 3, 1000.0

    def hertz(mel):
        return np.where(mel < knee / step, mel * step, knee * np.exp((mel - knee / step) * math.log(6.4) / 27))

    highest = knee / step + math.log(RATE / 2 / knee) * 27 / math.log(6.4)
    edge = hertz(np.linspace(0, highest, bands + 2))
    frequency = np.linspace(0, RATE / 2, FRAME // 2 + 1)
    rise = (frequency - edge[:-2, None]) / np.diff(edge)[:-1, None]
    fall = (edge[2:, None] - frequency) / np.diff(edge)[1:, None]
    return np.maximum(0, np.minimum(rise, fall)) * (2 / (edge[2:] - edge[:-2]))[:, None]


def log_mel(x: np.ndarray, bands: int = 80, frames: int = WINDOW * RATE // HOP) -> np.ndarray:
    """float32 mel_TI of one window: `frames` rows, x padded with silence. UserError for samples that do not fit or are no sound."""
    if x.ndim != 1 or len(x) > frames * HOP:
        raise UserError(f"sound of shape {x.shape} does not fit a window of {frames * HOP} samples; see models.audio.windows")
    if not np.isfinite(x).all():
        raise UserError("the sound holds samples that are no numbers; read it again")
    padded = np.pad(np.pad(x.astype(np.float64), (0, frames * HOP - len(x))), FRAME // 2, mode="reflect")
    rows = np.lib.stride_tricks.sliding_window_view(padded, FRAME)[: frames * HOP : HOP]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(FRAME) / FRAME)
    power = np.abs(np.fft.rfft(rows * hann, axis=1)) ** 2
    loud = np.log10(np.maximum(power @ mel_filters(bands).T, 1e-10))
    return ((np.maximum(loud, loud.max() - 8) + 4) / 4).astype(np.float32)
