"""The operator's webhooks, each with its path: deploy/kubernetes/images/webhooks.yaml says when they are asked."""

import ssl
from collections.abc import Callable
from functools import partial

from csi_driver.model.errors import FailedPrecondition, InvalidArgument, PermissionDenied
from csi_driver.operator.admission import machine_images, review
from csi_driver.operator.admission.classes import ClassRules
from csi_driver.operator.admission.images import ImageRules
from csi_driver.operator.admission.lookups import Cluster
from csi_driver.operator.admission.review import Request, Verdict
from csi_driver.operator.admission.secrets import SecretRules
from csi_driver.operator.admission.server import Limits, ReviewServer
from csi_driver.operator.admission.tally import ALLOWED, FAILED, REFUSED, Tally
from csi_driver.operator.settings import OperatorSettings

Rule = Callable[[Request], Verdict]

ACCOUNT = "luks-csi-operator"
"""The operator's service account."""


class Admission:
    """Reviews from `start` to `ask_to_end`, at `listen` (host, port), with the certificate that `context` gives."""

    def __init__(
        self,
        settings: OperatorSettings,
        cluster: Cluster,
        context: Callable[[], ssl.SSLContext],
        listen: tuple[str, int],
        limits: Limits | None = None,
    ) -> None:
        account = f"system:serviceaccount:{settings.namespace}:{ACCOUNT}"
        self._rules: dict[str, Rule] = {
            "secrets": SecretRules(cluster, settings.driver_name).review,
            "storageclasses": ClassRules(cluster, settings).review,
            "images": ImageRules(cluster, settings, account).review,
            "parameters": lambda request: machine_images.mutate(request, cluster),
        }
        self.tally = Tally()
        paths = {f"/{webhook}": partial(self.answer, webhook) for webhook in self._rules}
        self._server = ReviewServer(listen, paths, context, limits or Limits())

    def start(self) -> None:
        """Listen. Raises FailedPrecondition when the address cannot be used."""
        self._server.start()

    def ask_to_end(self) -> None:
        """Listen no more."""
        self._server.stop()

    @property
    def port(self) -> int:
        """Where it listens; 0 before `start`."""
        return self._server.port

    def answer(self, webhook: str, body: bytes) -> bytes:
        """Review what the API sends to the path of a webhook. Raises InvalidArgument for what is no review."""
        request = review.read(body)
        try:
            verdict = self._rules[webhook](request)
        except (InvalidArgument, PermissionDenied, FailedPrecondition) as error:
            self.tally.count(webhook, REFUSED)
            return review.refuse(request, error)
        except BaseException:
            self.tally.count(webhook, FAILED)
            raise
        self.tally.count(webhook, ALLOWED)
        return review.allow(request, verdict)
