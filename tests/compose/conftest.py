"""The shipped files, really brought up: on a Docker daemon of the tests' own, with the images that build/images gives.

Prometheus is Debian's, in an image of the name that the file has; Grafana cannot be had and is overridden away.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import debian
from fakes.compose import rendered
from fakes.docker import Docker, daemon

# As the image of prom/prometheus has it: user, directories, arguments.
PROMETHEUS = """FROM xim-test/prometheus
RUN install -d -o 65534 -g 65534 /prometheus
USER 65534:65534
VOLUME /prometheus
WORKDIR /prometheus
ENTRYPOINT ["/usr/bin/prometheus"]
CMD ["--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/prometheus"]
"""


@pytest.fixture(scope="module")
def docker(image_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Docker]:
    place = tmp_path_factory.mktemp("prometheus")
    (place / "Dockerfile").write_text(PROMETHEUS)
    with daemon(image_data) as docker:
        docker.load(debian.archive("prometheus"), "xim-test/prometheus")
        name = rendered("compose.local.yaml")["services"]["prometheus"]["image"]
        docker("build", "-t", name, str(place))
        yield docker
