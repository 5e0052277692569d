"""The embedded digits."""

import numpy as np
import pytest

from aiosgd.plugins.datasets import Digits, sha256


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    dataset = Digits(Digits.Params(), tmp_path_factory.mktemp("data") / "missing")
    assert dataset.files() == []
    return dataset.load({})


def test_the_file_is_the_one_that_results_were_reported_with():
    assert sha256(Digits.content) == (
        "c1d543118a7e23a716643698136e4e9ec621b6af45cd56a128ecff335df34723"
    )


def test_it_has_1437_images_to_train_on_and_360_to_test_on(digits):
    assert digits.train_x.shape == (1437, 8, 8)
    assert digits.test_x.shape == (360, 8, 8)
    assert digits.classes == 10


def test_pixels_are_scaled_to_the_unit_interval_without_loss(digits):
    pixels = np.concatenate([digits.train_x, digits.test_x]) * 16
    assert np.array_equal(np.unique(pixels), np.arange(17))


def test_classes_have_the_published_sizes_and_each_gives_a_fifth_to_the_test(digits):
    test = np.bincount(digits.test_y)
    total = np.bincount(digits.train_y) + test
    # Alpaydin and Kaynak's own counts for the test set
    assert total.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert np.abs(test - total / 5).max() < 1


def test_no_image_is_in_both_parts(digits):
    images = np.concatenate([digits.train_x, digits.test_x]).reshape(1797, -1)
    assert len(np.unique(images, axis=0)) == 1797


def test_the_licence_note_lies_beside_the_file():
    note = Digits.content.with_name("LICENSE-digits.txt").read_text(encoding="utf-8")
    assert "CC BY 4.0" in note
    assert "10.24432/C50P49" in note
