"""The agent of a node: makes the copies of images that are wanted there, and removes those that are wanted no more.

What is wanted are the ImageCopy objects of this node. What is there is asked of the disk, each time: an agent that was
killed knows nothing and needs to know nothing. One look at a copy takes no time; what does is done by a child process.
"""

import contextlib
import time
from typing import Final

import msgspec

from csi_driver.agent.jobs import Job
from csi_driver.agent.leftovers import Leftovers
from csi_driver.agent.requests import Requests, is_download, is_made
from csi_driver.agent.settings import AgentSettings
from csi_driver.agent.uploads import Uploads
from csi_driver.agent.wishes import Wishes
from csi_driver.agent.work import Failed, Made, facts_of, foreign
from csi_driver.host.log import log
from csi_driver.images.library import ImageLibrary
from csi_driver.images.store import ImageRecord
from csi_driver.keys.audit import Audit
from csi_driver.kube.client import Kube
from csi_driver.kube.controller import Controller
from csi_driver.kube.copies import State, state_of
from csi_driver.kube.informer import Informer
from csi_driver.kube.kinds import FINALIZER, IMAGE, IMAGE_COPY, Json, is_going, name_of, uid_of
from csi_driver.model.errors import DriverError, InvalidArgument, NotFound, VolumeBusy
from csi_driver.model.times import recorded_now

_STOP_SECONDS: Final = 20.0
_FIRST_PAUSE, _MOST_PAUSE = 10.0, 300.0
_BUSY_PAUSE: Final = 2.0
_LOOK_SECONDS: Final = 300.0
"""Between two looks at a file that is ready: somebody may have taken it away."""
_TELL_SECONDS: Final = 1.0  # between two words about how far a job is
_LIMIT: Final = "raise the limit"


class Agent:
    """Keeps the copies of `settings.node` as the objects want them, from `start` to `stop`."""

    def __init__(self, kube: Kube, settings: AgentSettings, library: ImageLibrary, uploads: Uploads) -> None:
        self._kube = kube
        self._settings = settings
        self._library = library
        self._uploads = uploads
        self._audit = Audit(settings.audit_file)
        self._jobs: dict[str, Job] = {}
        self._paused: dict[str, float] = {}
        self._told: dict[str, float] = {}
        self.controller = Controller("copies", self.reconcile)
        self.copies = Informer(kube, IMAGE_COPY, self._copy_changed, fields={"spec.node": settings.node})
        self.images = Informer(kube, IMAGE, self._image_changed)
        self._requests = Requests(kube, settings, uploads, self.images.get)
        self.wishes = Wishes(kube, settings, self.images, self.copies)
        self.leftovers = Leftovers(kube, settings, library, uploads, self.images, self.copies)

    def start(self) -> None:
        """Begin."""
        for informer in (self.images, self.copies):
            informer.start()
        self.controller.start()

    def stop(self) -> None:
        """Begin nothing any more; what children do is gone on with by the next agent."""
        self.wishes.ask_to_end()
        self.leftovers.ask_to_end()
        self.controller.ask_to_end()
        for informer in (self.images, self.copies):
            informer.ask_to_end()
        self.controller.join(_STOP_SECONDS)
        jobs = [*self._jobs.values()]
        for job in jobs:
            job.stop()
        for job in jobs:
            if not job.join(_STOP_SECONDS):
                job.stop()

    def reconcile(self, name: str) -> float | None:
        """Bring one copy a step nearer to what is wanted."""
        copy = self.copies.get(name)
        job = self._jobs.get(name)
        if copy is None or is_going(copy):
            if job is not None and job.result is None:
                job.stop()
                return 0.5
            self._told.pop(name, None)
            self._paused.pop(name, None)
            if self._jobs.pop(name, None) is not None:
                self._wake_waiting()
            return self._remove(copy) if copy is not None else None
        if job is not None and job.result is None:
            if (wait := self._told.get(name, 0.0) + _TELL_SECONDS - time.monotonic()) > 0:
                return wait
            self._tell(copy, State.IN_PROGRESS, _words(job), **_progress(job))
            self._told[name] = time.monotonic()
            return None
        if job is not None:
            del self._jobs[name]
            self._wake_waiting()
            return self._ended(copy, job.result)
        return self._look(copy)

    def _ended(self, copy: Json, result: Made | Failed | None) -> float | None:
        """Its child has told how it ended."""
        if isinstance(result, Failed) and result.busy:
            self._tell(copy, State.PENDING, result.text)
            return _BUSY_PAUSE
        if isinstance(result, Failed):
            return self._failed(copy, self._in_words_of_an_image(copy, result))
        if isinstance(result, Made):
            if (said := self._unlike(copy, result.checksum)) is not None:
                return self._failed(copy, Failed(said, permanent=True))
            self._ready(copy, result.record, result.checksum)
        return None

    def _look(self, copy: Json) -> float | None:
        """Nothing is at work on it: what is there, and what is to be done."""
        image_name, uid = copy["spec"]["image"], copy["spec"]["imageUID"]
        status = copy.get("status", {})
        record, obstacle = self._found(copy)
        known = status.get("image", {}).get("checksum")
        if record is not None and known:
            self._ready(copy, record, known)
            return _LOOK_SECONDS
        image = self.images.get(image_name)
        if image is None or uid_of(image) != uid:
            return 2.0  # not seen yet, or going: its copies go too
        there = record is not None
        if self._is_given_up(copy, image, there=there or obstacle is not None):
            return _LOOK_SECONDS
        if (wait := self._paused.get(name_of(copy), 0.0) - time.monotonic()) > 0:
            return wait
        if obstacle is not None:
            return self._failed(copy, obstacle)
        if self._at_work(downloads=is_download(copy, image, there=there)) >= self._settings.jobs_at_once:
            self._tell(copy, State.PENDING, "waits for other images that this node is at work on")
            return None
        try:
            request = self._requests.of(copy, self._held_to_its_digest(image), there=there)
        except DriverError as error:
            return self._failed(copy, Failed(str(error), permanent=isinstance(error, InvalidArgument)))
        if request is None:
            refused = self._uploads.refused(image_name, uid)
            said, address = refused or "waits for luks-csi image upload", self._settings.address
            self._tell(copy, State.AWAITING_UPLOAD, said, address=address, elsewhere=True if refused else None)
            return None
        key = name_of(copy)
        self._jobs[key] = Job(request, self._audit, lambda: self.controller.tell(key))
        self._tell(copy, State.IN_PROGRESS, "starting", progress=0)
        self._told[key] = time.monotonic()
        return None

    def _found(self, copy: Json) -> tuple[ImageRecord | None, Failed | None]:
        """The file of a copy, if it is there, and what lies in its place: another image, one that cannot be read.

        Of the latter nobody knows that it is another one's: this node cannot let go of it.
        """
        try:
            record = self._library.get(copy["spec"]["image"])
        except NotFound:
            return None, None
        except DriverError as error:
            return None, Failed(str(error))
        is_own = record.owner == copy["spec"]["imageUID"]
        return (record, None) if is_own else (None, Failed(foreign(record), elsewhere=True))

    def _is_given_up(self, copy: Json, image: Json, *, there: bool) -> bool:
        """Whether it has failed for good, and nobody has changed the Image since: its limit, say."""
        status = copy.get("status", {})
        if not status.get("permanent") or not (there or is_made(copy, image)):
            return False
        if status.get("observedGeneration") in (None, _generation(image)):
            return True
        self._paused.pop(name_of(copy), None)
        return False

    def _ready(self, copy: Json, record: ImageRecord, checksum: str) -> None:
        with contextlib.suppress(VolumeBusy):  # it goes at the next look
            self._uploads.forget(record.name, copy["spec"]["imageUID"])
        self._paused.pop(name_of(copy), None)
        facts, used = facts_of(record, checksum), copy.get("status", {}).get("lastUsed", "")
        used = max(used, self.wishes.last_used(record.name)) or recorded_now()
        self._tell(copy, State.READY, "", progress=100, address=self._settings.address, image=facts, lastUsed=used)

    def _failed(self, copy: Json, failed: Failed) -> float | None:
        attempts = copy.get("status", {}).get("attempts", 0) + 1
        image = self.images.get(copy["spec"]["image"]) or {"metadata": {}, "spec": {}}
        retries, tried = image["spec"].get("retries"), image.get("status", {}).get("tried") or ()
        in_all = attempts + sum(each["attempts"] for each in tried) if copy["spec"].get("make") else attempts
        permanent, text, elsewhere = failed.permanent, failed.text, failed.elsewhere
        if not permanent and retries is not None and in_all > retries:
            permanent, text, elsewhere = True, f"{text} (given up after {in_all} attempts)", False
        pause = min(_FIRST_PAUSE * 2 ** min(in_all - 1, 10), _MOST_PAUSE)
        log.warning("image not made", image=copy["spec"]["image"], error=text, permanent=permanent, attempts=attempts)
        self._paused[name_of(copy)] = time.monotonic() + pause
        self._tell(
            copy, State.FAILED, text, attempts=attempts, permanent=permanent, elsewhere=elsewhere or None,
            observedGeneration=_generation(image) if permanent else None,
        )  # fmt: skip
        return _LOOK_SECONDS if permanent else pause

    def _held_to_its_digest(self, image: Json) -> Json:
        """An Image without a checksum, of which an upload has come that announced one."""
        announced = self._uploads.announced(name_of(image), uid_of(image))
        return image if announced is None else image | {"spec": {"checksum": str(announced), **image["spec"]}}

    def _in_words_of_an_image(self, copy: Json, failed: Failed) -> Failed:
        """What is to be done about a failure for good, where an Image is asked for and no command."""
        source = (self.images.get(copy["spec"]["image"]) or {"spec": {"source": {}}})["spec"]["source"]
        if not failed.permanent:
            return failed
        text = failed.text.replace(_LIMIT, "raise spec.limit of the Image")
        if text == failed.text and "upload" in source and copy["spec"].get("make"):
            text = f"{text}; what an Image is made of does not change: delete it and make it anew"
        return msgspec.structs.replace(failed, text=text)

    def _unlike(self, copy: Json, checksum: str) -> str | None:
        """What to say of a file that is another one than the Image's: all of its copies are the same."""
        name = copy["spec"]["image"]
        expected = (self.images.get(name) or {}).get("status", {}).get("checksum")
        if expected in (None, checksum):
            return None
        return (
            f"the file of image {name} on this node has the SHA-256 {checksum} and that of the Image is {expected}; "
            f"remove it there with luks-csi image delete {name} --owned, it is pulled from another node then"
        )

    def _remove(self, copy: Json) -> float | None:
        name, uid = copy["spec"]["image"], copy["spec"]["imageUID"]
        try:
            if not self._wanted_otherwise(copy):
                self._uploads.forget(name, uid)
                self._library.drop(name, uid)
        except DriverError as error:
            self._tell(copy, state_of(copy), f"not removed yet: {error}")
            return 2.0
        kept = [each for each in copy["metadata"].get("finalizers", ()) if each != FINALIZER]
        with contextlib.suppress(NotFound):
            self._kube.patch(IMAGE_COPY, name_of(copy), {"metadata": {"finalizers": kept or None}})
        return None

    def _wanted_otherwise(self, copy: Json) -> bool:
        """Whether another object of this node, which stays, is for the same file."""
        return any(
            all(other["spec"][field] == copy["spec"][field] for field in ("image", "imageUID", "node"))
            for other in self.copies.all()
            if name_of(other) != name_of(copy) and not is_going(other)
        )

    def _tell(self, copy: Json, state: State, message: str, **more: object) -> None:
        """Write the status where it is not that already."""
        before = copy.get("status", {})
        wanted = {"state": state, "message": message, **more}
        if state is not State.IN_PROGRESS:  # what told of the way there is told no more
            wanted = dict.fromkeys(("doing", "bytesDone", "bytesTotal", "bytesPerSecond")) | wanted
        if state is not State.FAILED:
            wanted |= {"permanent": None, "observedGeneration": None}
        if state is State.READY:
            wanted |= {"attempts": None, "elsewhere": None}
        patch = {key: value for key, value in wanted.items() if before.get(key) != value}
        if patch:
            with contextlib.suppress(NotFound):
                self.copies.saw(self._kube.patch(IMAGE_COPY, name_of(copy), {"status": patch}, status=True))

    def _at_work(self, *, downloads: bool) -> int:
        """Jobs of which one more would be: downloads that last for ever keep nothing else waiting."""
        return sum(job.result is None and job.downloads == downloads for job in self._jobs.values())

    def _wake_waiting(self) -> None:
        for copy in self.copies.all():
            if state_of(copy) is State.PENDING:
                self.controller.tell(name_of(copy))

    def _copy_changed(self, copy: Json) -> None:
        self.controller.tell(name_of(copy))

    def _image_changed(self, image: Json) -> None:
        for copy in self.copies.all():
            if copy["spec"]["image"] == name_of(image):
                self.controller.tell(name_of(copy))


def _generation(image: Json) -> int | None:
    found: int | None = image["metadata"].get("generation")
    return found


def _words(job: Job) -> str:
    return job.doing.what


def _progress(job: Job) -> dict[str, object]:
    done, total = job.doing.done, job.doing.total
    told: dict[str, object] = {"doing": job.doing.what, "bytesDone": done, "bytesPerSecond": job.bytes_per_second}
    if total:
        told |= {"bytesTotal": total, "progress": min(99, 100 * done // total)}
    return told
