"""PyKMIP's server: `python -m tests.keys.kmip_server FOLDER PORT CERTIFICATE KEY CA`."""

import logging
import sys
from pathlib import Path

from kmip.services.server.server import KmipServer


def main() -> None:
    folder, port, certificate, key, authority = sys.argv[1:]
    policies = Path(folder, "kmip-policies")
    policies.mkdir(exist_ok=True)
    server = KmipServer(
        hostname="127.0.0.1",
        port=int(port),
        certificate_path=certificate,
        key_path=key,
        ca_path=authority,
        auth_suite="TLS1.2",
        config_path=None,
        log_path=str(Path(folder, "kmip-server.log")),
        policy_path=str(policies),
        enable_tls_client_auth=True,
        logging_level="ERROR",
        database_path=str(Path(folder, "kmip.db")),
    )
    logging.disable(logging.WARNING)
    with server:
        server.serve()


if __name__ == "__main__":
    main()
