"""Lock files of images: they go with what they lock, those of killed calls too."""

from pathlib import Path

import pytest

from csi_driver.host.files import Files
from csi_driver.images.store import ImageStore, lock_of
from csi_driver.images.target import Target, hold


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    store = ImageStore(tmp_path / "images", Files())
    store.start()
    return store


def test_the_lock_file_of_a_killed_run_goes_with_the_image(store: ImageStore) -> None:
    lock = lock_of(store.begin("disk"))
    lock.touch()
    store.delete("disk")
    assert not lock.exists()


def test_it_is_the_file_that_a_run_holds(store: ImageStore) -> None:
    folder = store.begin("disk")
    with hold(Target(folder), "image disk"):
        assert lock_of(folder).exists()
    assert not lock_of(folder).exists()
