"""A volume that wants an image which its node has not: told of it, brought, and made when it is whole."""

import pytest

from csi_driver.images.cluster import ClusterImages
from csi_driver.model.errors import Aborted, ResourceExhausted
from tests.image_server import ImageServer
from tests.operator.lab import Lab
from tests.unit.test_volume_from_image import BLOCK, NOTHING, Rig

_WISHED = {"backingImage": "wished"}


def test_an_image_is_brought_to_the_node_of_the_first_volume_that_wants_it(lab: Lab, web: ImageServer) -> None:
    lab.image("wished", {"download": {"url": web.url()}})
    lab.wait_phase("wished")
    (having,) = lab.wait_copies("wished", 1)
    (other,) = {"one", "two"} - {having}
    cluster, rig = ClusterImages(lab.images_of(other)), Rig(lab.folder / other)
    lab.wait("word of the image", lambda: (found := cluster.find("wished")) and found.ready)
    assert rig.provisioning.capacity(_WISHED, None, [BLOCK]).available > 0
    with pytest.raises(Aborted, match=r"image wished is being brought to this node"):
        rig.create(_WISHED, "pvc-wished", secret=NOTHING)
    # As the provisioner does: the same node again, until the volume is there.
    lab.wait("volume", lambda: rig.create(_WISHED, "pvc-wished", secret=NOTHING))
    assert rig.disk("pvc-wished").read_bytes().startswith(web.content)
    lab.wait("end of the wish", lambda: not cluster.wanted())
    assert sorted(lab.wait_copies("wished", 2)) == ["one", "two"]
    rig.backend.delete("pvc-wished")
    lab.delete_image("wished")
    lab.wait("word of its end", lambda: cluster.find("wished") is None)
    with pytest.raises(ResourceExhausted, match=r"image wished is not on this node"):
        rig.create(_WISHED, "pvc-wished", secret=NOTHING)


def test_what_was_told_comes_back_where_it_was_taken_away_and_goes_where_it_is_true_no_more(
    lab: Lab, web: ImageServer
) -> None:
    lab.image("told", {"download": {"url": web.url()}})
    lab.wait_phase("told")
    cluster = ClusterImages(lab.images_of("one"))
    lab.wait("word of the image", lambda: cluster.find("told"))
    cluster.forget("told")
    cluster.tell("never-was", "uid-1", ready=True, here=False, percent=None, message="")
    cluster.want("never-was")
    lab.wait("word of the image again", lambda: cluster.find("told"))
    lab.wait("end of the other", lambda: not cluster.has("never-was") and not cluster.wanted())
    lab.delete_image("told")
