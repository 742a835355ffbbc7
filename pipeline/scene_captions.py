"""What a scene shows -> what the web might write beside it.  Words only; scenes.py draws and stores.

Right captions come from templates; wrong ones, shop texts, file names, boilerplate and five other languages are what a
filter has to tell from them.  The languages avoid agreement ("de couleur verte"), so one word table each is enough.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "crescent")
COLORS = ("red", "green", "blue", "yellow", "orange", "purple", "pink", "white")
BACKGROUNDS = ("black", "gray", "brown", "navy", "maroon", "teal")
OBJECTS = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)

KIND_FRACTIONS = {
    "honest": 0.405,
    "wrong_caption": 0.20,
    "unrelated_text": 0.12,
    "foreign": 0.08,
    "boilerplate": 0.06,
    "too_small": 0.04,
    "extreme_aspect": 0.04,
    "duplicate": 0.03,
    "unreadable": 0.015,
    "null_caption": 0.01,
}
"""Kinds of rows in the spoiled pool and their shares."""
RIGHT_KINDS = ("honest", "too_small", "extreme_aspect", "duplicate")
"""Kinds with a readable picture and an English caption that states what is in it."""

CAPTION_TEMPLATES = (
    "a photo of a {color} {shape}",
    "photo of one {color} {shape}",
    "this is a {color} {shape}",
    "there is a {color} {shape} in the picture",
    "the {shape} in this picture is {color}",
    "a picture of a {color} {shape} on {background} paper",
    "a {color} {shape} on a {background} background",
    "a photo of a {shape}",
    "this is a {shape}",
    "a {shape} on a {background} background",
    "a photo of something {color}",
)
"""Some leave out the color or the shape, as people do, and so teach each alone; nothing that is stated is wrong."""

TASK_TEMPLATES = {
    "shape": ("a photo of a {c}.", "this is a {c}.", "there is a {c} in the picture."),
    "color": ("a photo of something {c}.", "there is something {c} in the picture."),
    "object": ("photo of one {c}.", "this is one {c}.", "there is one {c} in the picture."),
}

FOREIGN_TEMPLATES = {
    "de": "ein Bild: {shape} in {color} auf einem Hintergrund in {background}",
    "fr": "une photo avec {shape} de couleur {color} sur un fond de couleur {background}",
    "es": "una foto con {shape} de color {color} sobre un fondo de color {background}",
    "ru": "на картинке {shape} {color} цвета на фоне {background} цвета",
    "zh": "{background}背景上的{color}{shape}",
}
FOREIGN_SHAPES = {
    "de": ("ein Kreis", "ein Quadrat", "ein Dreieck", "ein Stern", "ein Kreuz", "ein Ring", "ein Herz", "eine Sichel"),
    "fr": ("un cercle", "un carré", "un triangle", "une étoile", "une croix", "un anneau", "un cœur", "un croissant"),
    "es": (
        "un círculo",
        "un cuadrado",
        "un triángulo",
        "una estrella",
        "una cruz",
        "un anillo",
        "un corazón",
        "una media luna",
    ),
    "ru": ("круг", "квадрат", "треугольник", "звезда", "крест", "кольцо", "сердце", "полумесяц"),
    "zh": ("圆形", "正方形", "三角形", "星星", "十字", "圆环", "心形", "月牙"),
}
FOREIGN_COLORS = {
    "de": ("Rot", "Grün", "Blau", "Gelb", "Orange", "Violett", "Rosa", "Weiß"),
    "fr": ("rouge", "verte", "bleue", "jaune", "orange", "violette", "rose", "blanche"),
    "es": ("rojo", "verde", "azul", "amarillo", "naranja", "morado", "rosa", "blanco"),
    "ru": ("красного", "зелёного", "синего", "жёлтого", "оранжевого", "фиолетового", "розового", "белого"),
    "zh": ("红色", "绿色", "蓝色", "黄色", "橙色", "紫色", "粉色", "白色"),
}
FOREIGN_BACKGROUNDS = {
    "de": ("Schwarz", "Grau", "Braun", "Dunkelblau", "Dunkelrot", "Dunkeltürkis"),
    "fr": ("noire", "grise", "marron", "bleu foncé", "rouge foncé", "turquoise foncé"),
    "es": ("negro", "gris", "marrón", "azul oscuro", "rojo oscuro", "turquesa oscuro"),
    "ru": ("чёрного", "серого", "коричневого", "тёмно-синего", "тёмно-красного", "тёмно-бирюзового"),
    "zh": ("黑色", "灰色", "棕色", "深蓝色", "深红色", "深青色"),
}

UNRELATED_TEMPLATES = (
    "IMG_{number}.JPG",
    "DSC0{number}",
    "wp-content-uploads-{number}_large.png",
    "Buy {thing} online - free shipping on orders over ${price}",
    "{thing} for sale, only ${price} while stocks last",
    "Customer reviews of {thing} ({number} ratings)",
    "The ten best deals on {thing} this week",
    "Posted by admin on March {day}, 2014",
    "How to choose {thing} for your home",
    "{place} hotels and apartments from ${price} a night",
    "Things to do in {place} this summer 🌴☀️",
    "News from {place}: what we know so far",
)
THINGS = (
    "running shoes",
    "coffee machines",
    "garden chairs",
    "phone cases",
    "winter jackets",
    "used cars",
    "beds",
)
PLACES = ("London", "Tokyo", "Istanbul", "New York", "Sydney", "Lisbon", "Cape Town", "Toronto")

BOILERPLATE = (
    "image",
    "photo",
    "logo",
    "thumbnail",
    "click to enlarge",
    "View larger image",
    "Share on Facebook",
    "no image available",
    "loading...",
    "default alt text",
    "Skip to main content",
    "image may be subject to copyright",
)


@dataclass(frozen=True, slots=True)
class Content:
    """What a scene shows, in the words of SHAPES, COLORS and BACKGROUNDS."""

    shape: str
    color: str
    background: str


def pick(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
    """Return one of the choices, each as likely."""
    return choices[int(rng.integers(len(choices)))]


def draw_content(rng: np.random.Generator, label: int | None = None) -> Content:
    """Return a random shape and color, or those of OBJECTS[label], on a random background."""
    color, shape = OBJECTS[int(rng.integers(len(OBJECTS))) if label is None else label].split()
    return Content(shape, color, pick(rng, BACKGROUNDS))


def choose_caption(kind: str, content: Content, rng: np.random.Generator) -> str | None:
    """Return the caption that a row of this kind has beside what it shows; None for null_caption."""
    if kind == "wrong_caption":
        return write_caption(_draw_other(content, rng), rng)
    if kind == "unrelated_text":
        return write_unrelated_text(rng)
    if kind == "foreign":
        return write_foreign_caption(content, rng)
    if kind == "boilerplate":
        return pick(rng, BOILERPLATE)
    return None if kind == "null_caption" else write_caption(content, rng)


def _draw_other(content: Content, rng: np.random.Generator) -> Content:
    """Return what another scene shows: another shape and another color, so that no caption of it fits this one."""
    while True:
        other = draw_content(rng)
        if other.shape != content.shape and other.color != content.color:
            return other


def write_caption(content: Content, rng: np.random.Generator) -> str:
    """Return an English caption that is right; about one in eight has capitals, a full stop, emoji or a line break."""
    caption = pick(rng, CAPTION_TEMPLATES).format(**dataclasses.asdict(content))
    caption = caption.replace("a orange", "an orange")
    roll = rng.random()
    if roll < 0.04:
        return caption.capitalize() + "."
    if roll < 0.07:
        return caption.title()
    if roll < 0.10:
        return pick(rng, ("✨ {}", "{} 😍👍", "📷 {}", "「{}」")).format(caption)
    return caption.replace(" ", "\n", 1) if roll < 0.125 else caption


def write_foreign_caption(content: Content, rng: np.random.Generator) -> str:
    """Return a right caption in German, French, Spanish, Russian or Chinese."""
    language = pick(rng, tuple(FOREIGN_TEMPLATES))
    return FOREIGN_TEMPLATES[language].format(
        shape=FOREIGN_SHAPES[language][SHAPES.index(content.shape)],
        color=FOREIGN_COLORS[language][COLORS.index(content.color)],
        background=FOREIGN_BACKGROUNDS[language][BACKGROUNDS.index(content.background)],
    )


def write_unrelated_text(rng: np.random.Generator) -> str:
    """Return alt text as shops, blogs and cameras leave it; it names no shape and no color."""
    return pick(rng, UNRELATED_TEMPLATES).format(
        number=int(rng.integers(1000, 10000)),
        price=int(rng.integers(5, 200)),
        day=int(rng.integers(1, 29)),
        thing=pick(rng, THINGS),
        place=pick(rng, PLACES),
    )
