"""Sets of TensorFlow Datasets with their real features, written as TFDS writes them."""

import io
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(
        file, kind, **options
    )
    return file.getvalue()


def real_features(name):
    """What the code of TFDS itself says an example of the set is."""
    return tfds.builder(name, data_dir="/nonexistent").info.features


def prepare(folder, name, features, splits):
    """Writes a set: the same calls of TFDS as `tfds build` makes, with our own examples.

    TFDS shuffles them and writes ArrayRecord files, dataset_info.json and features.json.
    """
    set_name, _, config = name.partition("/")

    class Ours(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = set_name
        VERSION = tfds.core.Version("3.0.1")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] if config else []

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {key: iter(enumerate(examples)) for key, examples in splits.items()}

        def _generate_examples(self):
            raise AssertionError

    tfds.disable_progress_bar()
    builder = Ours(data_dir=folder)
    builder.download_and_prepare(file_format="array_record")
    return Path(builder.data_path)


def grey(number):
    """A 28 x 28 picture that tells its number."""
    image = np.random.default_rng(number).integers(0, 256, (28, 28), dtype=np.uint8)
    image[0, 0] = number
    return image
