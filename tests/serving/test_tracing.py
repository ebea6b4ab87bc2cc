"""Spans of the real service, as they reach an exporter that stands in for OpenTelemetry's, which not everybody has."""

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest

from coterie.bundle import Bundle

PACKAGE = "opentelemetry/exporter/otlp/proto/http"
# Takes the arguments that the real one takes.
EXPORTER = """
import json, os
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult


class OTLPSpanExporter(SpanExporter):
    def __init__(self, endpoint=None, certificate_file=None, client_key_file=None, client_certificate_file=None,
                 headers=None, timeout=None, compression=None, session=None):
        pass

    def export(self, spans):
        with open(os.environ["SPANS"], "a") as file:
            for span in spans:
                row = {"name": span.name, "kind": span.kind.name, "trace": f"{span.context.trace_id:032x}"}
                file.write(json.dumps(row) + "\\n")
        return SpanExportResult.SUCCESS
"""
TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.mark.parametrize("traced", [True, False])
def test_requests_but_the_probes_are_spans_where_tracing_is_on(
    traced: bool,
    tiny_bundle: Bundle,
    digit_images,
    run_service: Callable[..., AbstractContextManager[Any]],
    tmp_path: Path,
) -> None:
    exporter, spans = tmp_path / "exporter", tmp_path / "spans"
    (exporter / PACKAGE / "trace_exporter").mkdir(parents=True)
    (exporter / PACKAGE / "__init__.py").touch()
    (exporter / PACKAGE / "trace_exporter" / "__init__.py").write_text(EXPORTER)
    path = os.pathsep.join([str(exporter), *filter(None, [os.environ.get("PYTHONPATH")])])
    with (
        run_service(tiny_bundle, PYTHONPATH=path, SPANS=str(spans), COTERIE_OTEL=str(int(traced))) as service,
        httpx.Client(base_url=service.url, trust_env=False) as http,
    ):
        parent = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
        assert http.post("/v1/classify", content=digit_images.images[0], headers=parent).status_code == 200
        for path in ("/v1/classes", "/livez", "/readyz", "/metrics"):
            assert http.get(path).status_code == 200
    rows = [json.loads(line) for line in spans.read_text().splitlines()] if spans.exists() else []
    requests = {row["name"]: row["trace"] for row in rows if row["kind"] == "SERVER"}
    assert requests.keys() == ({"POST /v1/classify", "GET /v1/classes"} if traced else set())
    assert requests.get("POST /v1/classify", TRACE) == TRACE
