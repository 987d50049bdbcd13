"""Image files as they come from outside: good ones, and all kinds that cannot be judged."""

import functools
import io
import struct
import zlib

import numpy as np
from PIL import Image


def random_images(n, h=8, w=8, c=3, seed=0):
    """uint8 `[n, h, w, c]`, every level alike."""
    return np.random.default_rng(seed).integers(0, 256, (n, h, w, c), dtype=np.uint8)


def png(array, **kwargs):
    """An array as the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG", **kwargs)
    return buffer.getvalue()


def encode(image, format, **kwargs):
    """A Pillow image as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **kwargs)
    return buffer.getvalue()


def raw_png(width, height, depth, color, rows=b"", extra=b""):
    """A PNG file made by hand: Pillow cannot write 16-bit RGB, nor headers that lie."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@functools.cache
def broken_files():
    """Name -> (content, pattern of the reason), where 8 x 8 RGB images are expected."""
    rgb = random_images(1)[0]
    image = Image.fromarray(rgb)
    palette = image.quantize(8)
    see_through = Image.fromarray(random_images(1, c=4)[0])
    grey = Image.fromarray(rgb[..., 0])
    frames = [Image.fromarray(a) for a in random_images(3)]
    jpeg = encode(image, "JPEG")
    ok = png(rgb)
    text = zlib.compress(b"x" * (2 << 20))
    chunk = b"zTXt" + b"k\0\0" + text
    text_bomb = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    orientation = Image.Exif()
    orientation[0x0112] = 6
    return {
        "text.png": (b"I am no image at all.\n", "not an image"),
        "empty.png": (b"", "empty file"),
        "truncated.jpg": (jpeg[:-20], "cannot be decoded.*truncated|Truncated"),
        "header_only.jpg": (jpeg[:100], "not an image|cannot be decoded"),
        "truncated.png": (ok[: len(ok) // 2], "cannot be decoded"),
        "corrupt.png": (ok[:60] + bytes(20) + ok[80:], "cannot be decoded"),
        "grey16.png": (encode(Image.new("I;16", (8, 8)), "PNG"), "16 bits"),
        "rgb16.png": (raw_png(8, 8, 16, 2, (b"\0" + bytes(48)) * 8), "16 bits"),
        "grey32.tif": (encode(Image.new("I", (8, 8)), "TIFF"), "32 bits"),
        "float.tif": (encode(Image.new("F", (8, 8)), "TIFF"), "32 bits"),
        "rgba.png": (encode(image.convert("RGBA"), "PNG"), "alpha.*RGBA"),
        "la.png": (encode(grey.convert("LA"), "PNG"), "alpha.*LA"),
        "rgba.webp": (encode(see_through, "WEBP", lossless=True), "alpha.*RGBA"),
        "palette_alpha.png": (encode(palette, "PNG", transparency=3), "transparent"),
        "grey_key.png": (encode(grey, "PNG", transparency=3), "transparent"),
        "rgb_key.png": (encode(image, "PNG", transparency=(1, 2, 3)), "transparent"),
        "cmyk.jpg": (encode(image.convert("CMYK"), "JPEG"), "CMYK"),
        "lab.tif": (encode(Image.new("LAB", (8, 8)), "TIFF"), "LAB"),
        "animated.gif": (
            encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
            "3 pictures",
        ),
        "animated.png": (
            encode(frames[0], "PNG", save_all=True, append_images=frames[1:]),
            "3 pictures",
        ),
        "pages.tif": (
            encode(frames[0], "TIFF", save_all=True, append_images=frames[1:]),
            "3 pictures",
        ),
        "bomb.png": (raw_png(10**5, 10**5, 8, 2), "bomb"),
        "half_bomb.png": (raw_png(11000, 11000, 8, 2), "bomb"),
        "text_bomb.png": (raw_png(8, 8, 8, 2, bytes(25 * 8), text_bomb), "cannot be decoded"),
        "rotated.tif": (encode(image, "TIFF", exif=orientation), "orientation 6"),
        "wrong_size.png": (png(random_images(1, 9, 8)[0]), "8 x 9.*expected 8 x 8"),
        "grey.png": (encode(grey, "PNG"), "grey, expected RGB"),
    }
