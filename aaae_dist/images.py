"""Image files and pixels: decode, fit to a size, encode."""

import io
import re

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image, ImageOps

from aaae_dist.errors import one_line

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "pgm", "ppm")
LARGEST = 100_000_000  # pixels: a small file may claim to be a huge picture
Image.MAX_IMAGE_PIXELS = None  # the size in the header is looked at here, before anything is decoded


def decode(data: bytes) -> np.ndarray:
    """Pixels of an image file, upright, without alpha: uint8 (height, width) if it is grey, else (height, width, 3).

    Raises:
        ValueError: it cannot be read.
    """
    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > LARGEST:
            raise ValueError(f"{image.width} x {image.height} pixels, more than {LARGEST:,}")
        return np.asarray(eight_bits(ImageOps.exif_transpose(image)))
    except Exception as error:  # at damaged metadata PIL lets struct.error, TypeError, AttributeError and more through
        raise ValueError(why(error)) from error


def decode_into(pixels: UInt8[np.ndarray, "height width channels"], data: bytes) -> None:
    """Decode an image file of exactly this size and put its pixels, grey or RGB by the number of channels, there.

    The size is taken from the file's header, before anything is decoded.

    Raises:
        ValueError: it cannot be read, or has another size.
    """
    height, width, channels = pixels.shape
    if data.startswith(b"\xff\xd8\xff"):  # simplejpeg gives PIL's very pixels in a quarter of the time
        # It looks at the header, and refuses what does not fit into the buffer; what is smaller is seen by its shape.
        found = simplejpeg.decode_jpeg(data, "GRAY" if channels == 1 else "RGB", buffer=pixels)
        refuse_other_size(found.shape[1::-1], (width, height))
        return
    try:
        image = Image.open(io.BytesIO(data))
        refuse_other_size(image.size, (width, height))
        pixels[:] = np.asarray(eight_bits(image).convert("L" if channels == 1 else "RGB")).reshape(pixels.shape)
    except Exception as error:  # as in `decode`
        raise ValueError(why(error)) from error


def why(error: Exception) -> str:
    """What PIL says is wrong, without the address in memory that it says too."""
    return re.sub(r" <\S+ object at 0x\w+>", "", one_line(error))


def eight_bits(image: Image.Image) -> Image.Image:
    """An image as L if it is grey, else as RGB.

    Raises:
        ValueError: its values have no range that anybody knows.
    """
    if image.mode.startswith("I;16"):  # PIL would clip the values above 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("values of 32 bits, whose range nobody knows")
    if image.mode == "P":
        image = image.convert("RGBA")  # straight to RGB, PIL would warn of the alpha
    return image.convert("L" if is_grey(image) else "RGB")


def is_grey(image: Image.Image) -> bool:
    return image.mode in ("1", "L", "LA") or image.mode.startswith("I;16")


def refuse_other_size(found: tuple[int, ...], expected: tuple[int, int]) -> None:
    if found != expected:
        raise ValueError(f"{found[0]} x {found[1]} pixels instead of {expected[0]} x {expected[1]}")


def fit(pixels: np.ndarray, *, channels: int, size: int) -> np.ndarray:
    """Pixels as uint8 (size, size) or (size, size, 3): short side resized (antialiased bicubic), middle cut out.

    Smaller grey images, such as MNIST's 28 pixels, are bordered with black instead of blown up.
    """
    image = Image.fromarray(pixels).convert("L" if channels == 1 else "RGB")
    if channels == 1 and max(image.size) < size <= 2 * min(image.size):
        left, top = (size - image.width) // 2, (size - image.height) // 2
        canvas = Image.new("L", (size, size))
        canvas.paste(image, (left, top))
        return np.asarray(canvas)
    return np.asarray(
        image if image.size == (size, size) else ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    )
