"""The photographs of installed packages and their patches."""

import pytest
import torch

from crate_core.data.photographs import (
    STRIPE_WIDTH,
    cut_patches,
    grey_photographs,
    photographs,
    striped_patches,
    zero_mean_basis,
)

F64 = torch.float64


@pytest.mark.parametrize("size", [2, 5, 8])
def test_basis_spans_the_patches_without_mean(size):
    basis = zero_mean_basis(size)
    assert basis.shape == (size**2, size**2 - 1)
    torch.testing.assert_close(basis.T @ basis, torch.eye(size**2 - 1, dtype=F64))
    mean = torch.full((size**2, size**2), 1 / size**2, dtype=F64)
    torch.testing.assert_close(basis @ basis.T, torch.eye(size**2, dtype=F64) - mean)


def test_patches_are_the_picture_s_squares():
    picture = torch.arange(7 * 9, dtype=F64).reshape(7, 9)
    patches = cut_patches(picture, 3, 2)
    assert patches.shape == (3 * 4, 9)
    torch.testing.assert_close(patches[5].reshape(3, 3), picture[2:5, 2:5])


def test_stripes_of_the_two_parts_share_no_pixel():
    pytest.importorskip("skimage")
    pictures = grey_photographs()
    assert len(pictures) == 7
    assert all(p.min() >= 0 and p.max() <= 1 and p.ndim == 2 for p in pictures.values())
    fit, test = striped_patches("fit", every=64), striped_patches("test", every=64)
    for part, first in ((fit, 0), (test, STRIPE_WIDTH)):
        picture = pictures["flower"]
        own = part.x[part.photo == 1]
        corner = picture[:8, first : first + 8].reshape(-1) @ zero_mean_basis(8)
        torch.testing.assert_close(own[0], corner)
        assert set(part.photo.tolist()) == set(range(7))


def test_photographs_are_in_colour():
    assert all(p.shape == (3, 427, 640) for p in photographs())


@pytest.mark.bad_input
def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        zero_mean_basis(1)
    with pytest.raises(ValueError, match="fits"):
        cut_patches(torch.zeros(7, 20), 8, 4)
    with pytest.raises(ValueError, match="part must be"):
        striped_patches("train")
