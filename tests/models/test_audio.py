"""Sound files and resampling; log-mel windows are compared with transformers' in test_whisper.py."""

import wave

import numpy as np
import pytest

from tokeff.models.audio import HOP, RATE, log_mel, mel_filters, read_wav, resample, windows

pytestmark = pytest.mark.core


def write(path, samples, rate=RATE, channels=1, width=2):
    with wave.open(str(path), "wb") as f:
        f.setnchannels(channels)
        f.setsampwidth(width)
        f.setframerate(rate)
        f.writeframes(samples.tobytes())
    return path


def tone(hertz, rate, seconds=0.5):
    return np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)


@pytest.mark.parametrize("rate", [8000, 24_000, 44_100, 48_000])
def test_a_tone_is_the_same_tone_at_another_rate(rate):
    got, wanted = resample(tone(1000, rate), rate), tone(1000, RATE)
    assert len(got) == len(wanted)
    inner = slice(RATE // 20, -RATE // 20)
    np.testing.assert_allclose(got[inner], wanted[inner], atol=2e-3)


def test_what_the_lower_rate_cannot_hold_is_gone():
    assert np.abs(resample(tone(11_000, 48_000), 48_000)[800:-800]).max() < 1e-3


def test_channels_are_averaged(tmp_path):
    both = np.stack([np.full(100, 1000), np.full(100, 3000)], axis=1).astype("<i2")
    np.testing.assert_allclose(read_wav(write(tmp_path / "a.wav", both, channels=2)), np.full(100, 2000 / 32768), rtol=1e-6)


def test_other_files_are_refused_in_one_line(tmp_path, one_line):
    with one_line("cannot read"):
        read_wav(tmp_path / "none.wav")
    for name, data in (("text.wav", b"hello"), ("empty.wav", b""), ("cut.wav", b"RIFF\xff\xff\xff\x7fWAVEfmt ")):
        (tmp_path / name).write_bytes(data)
        with one_line(name, "not a WAV file"):
            read_wav(tmp_path / name)
    with one_line("8 bits", "give 16-bit"):
        read_wav(write(tmp_path / "b.wav", np.zeros(10, np.uint8), width=1))
    good = write(tmp_path / "c.wav", np.zeros(1000, "<i2")).read_bytes()
    (tmp_path / "c.wav").write_bytes(good[:40] + b"\xff\xff\xff\x7f" + good[44:-1])  # says that it is longer than it is
    assert len(read_wav(tmp_path / "c.wav")) == 999
    with one_line("does not fit a window"):
        log_mel(np.zeros(31 * RATE))
    with one_line("no numbers"):
        log_mel(np.array([0.0, np.nan]))
    nothing = ((np.zeros(0), "no samples"), (np.zeros(9), "silent"), (np.array([1.0, np.inf]), "no numbers"), (np.ones((2, 9)), "no row"))
    for bad, words in nothing:
        with one_line(words):
            windows(bad)


def test_long_sound_is_cut_where_it_is_quiet():
    x = np.random.default_rng(0).normal(size=70 * RATE)
    x[27 * RATE : 27 * RATE + RATE // 5] = 0
    x[52 * RATE : 52 * RATE + RATE // 5] = 0
    pieces = windows(x)
    np.testing.assert_array_equal(np.concatenate(pieces), x)
    assert [round(len(p) / RATE) for p in pieces] == [27, 25, 18]
    assert windows(x[:100])[0].shape == (100,)


def test_bands_are_triangles_of_area_one_and_a_tone_is_in_its_own():
    width = RATE / 2 / 200
    assert np.allclose((mel_filters() * width).sum(axis=1)[40:], 1, atol=0.1)  # higher bands span many frequencies
    mel = log_mel(tone(2000, RATE, 1.0), frames=200)
    assert mel.shape == (200, 80) and mel.dtype == np.float32
    peak = mel_filters()[:, round(2000 / width)].argmax()
    assert set(mel[5 : RATE // HOP - 5].argmax(axis=1)) == {peak}
