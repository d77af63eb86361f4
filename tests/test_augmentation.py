"""Flips and crops: every place as likely, and the same for a sample wherever it is computed."""

import torch

from aaae_dist.augmentation import augment
from aaae_dist.randomness import integers, sample_keys


def test_every_crop_is_cut_out_as_it_is_or_mirrored_and_all_are_as_likely():
    image = torch.arange(2 * 6 * 5, dtype=torch.uint8).view(1, 2, 6, 5)
    crops = [image[0, :, top : top + 4, left : left + 4] for top in range(3) for left in range(2)]
    places = {crop.contiguous().numpy().tobytes(): i for i, crop in enumerate(crops)}
    places |= {crop.flip(2).contiguous().numpy().tobytes(): 6 + i for i, crop in enumerate(crops)}
    count = 12_000
    keys = sample_keys(7, 0, count)
    for flip, kinds in ((True, 12), (False, 6)):
        found = augment(image.expand(count, -1, -1, -1), keys, size=4, flip=flip)
        assert found.dtype == torch.uint8
        tally = torch.bincount(torch.tensor([places[one.numpy().tobytes()] for one in found]), minlength=kinds)
        assert len(tally) == kinds
        expected = count / kinds
        assert ((tally - expected) ** 2 / expected).sum() < 31.3  # chi squared of 11 degrees, 0.999


def test_a_sample_is_varied_in_the_same_way_on_any_ranks():
    images = torch.randint(256, (64, 3, 10, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = augment(images, sample_keys(1, 100, 64), size=8, flip=True)
    for rank in range(4):
        part = augment(images[rank * 16 :][:16], sample_keys(1, 100 + rank * 16, 16), size=8, flip=True)
        assert torch.equal(part, whole[rank * 16 :][:16])
    assert not torch.equal(augment(images, sample_keys(2, 100, 64), size=8, flip=True), whole)


def test_whole_images_are_left_as_they_are():
    images = torch.randint(256, (5, 1, 8, 8), dtype=torch.uint8)
    assert torch.equal(augment(images, sample_keys(0, 0, 5), size=8, flip=False), images)


def test_integers_are_uniform_and_independent_of_other_streams():
    keys = sample_keys(3, 0, 70_000)
    one, other = integers(keys, 7, stream=1), integers(keys, 7, stream=2)
    together = torch.bincount(one * 7 + other, minlength=49)
    assert len(together) == 49
    expected = 70_000 / 49
    assert ((together - expected) ** 2 / expected).sum() < 84.0  # chi squared of 48 degrees, 0.999
