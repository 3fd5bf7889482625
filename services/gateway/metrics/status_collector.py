"""Prometheus' metric families from numbers that backbones tell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

LABELS = ["model_name", "backbone"]
Values = Mapping[str, Mapping[str, Any]]  # of each backbone, by endpoint
Kind = type[GaugeMetricFamily] | type[CounterMetricFamily]


class StatusCollector(Collector):
    """Every number is told of each backbone by itself: a sum would fall where one of them restarts."""

    def __init__(self, model: str, statuses: Sequence[Mapping[str, Any]]) -> None:
        self.model = model
        self.statuses = {str(status["endpoint"]): status for status in statuses}

    def labelled(self, name: str, help_text: str, label: str, counts: Mapping[str, Mapping[str, int]]) -> Metric:
        family = CounterMetricFamily(f"expertmesh:{name}", help_text, labels=[*LABELS, label])
        for endpoint, count_of in counts.items():
            for value, count in count_of.items():
                family.add_metric([self.model, endpoint, value], count)
        return family

    def families(self, kind: Kind, names: Mapping[str, tuple[str, str]], values: Values) -> Iterator[Metric]:
        for key, (name, help_text) in names.items():
            told = {endpoint: of_one[key] for endpoint, of_one in values.items()}
            yield self.family(kind, name, help_text, told)

    def family(self, kind: Kind, name: str, help_text: str, values: Mapping[str, float]) -> Metric:
        family = kind(f"expertmesh:{name}", help_text, labels=LABELS)
        for endpoint, value in values.items():
            family.add_metric([self.model, endpoint], value)
        return family
