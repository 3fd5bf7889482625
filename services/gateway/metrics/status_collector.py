"""A `StatusCollector` turns the status reports of backbones into Prometheus' metric families."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

LABELS = ["model_name", "backbone"]
Values = Mapping[str, Mapping[str, Any]]  # the numbers of each backbone, by endpoint
Kind = type[GaugeMetricFamily] | type[CounterMetricFamily]


class StatusCollector(Collector):
    """A `StatusCollector` makes metric families whose label `backbone` holds the endpoint of each backbone.

    Backbones are not summed up, because a sum of counters would fall when one backbone restarts.
    """

    def __init__(self, model: str, statuses: Sequence[Mapping[str, Any]]) -> None:
        self.model = model
        self.statuses = {str(status["endpoint"]): status for status in statuses}

    def labelled(self, name: str, help_text: str, label: str, counts: Mapping[str, Mapping[str, int]]) -> Metric:
        """Return a counter with one more `label`, from `counts` by endpoint and by the label's value."""
        family = CounterMetricFamily(f"expertmesh:{name}", help_text, labels=[*LABELS, label])
        for endpoint, count_by_label in counts.items():
            for label_value, count in count_by_label.items():
                family.add_metric([self.model, endpoint, label_value], count)
        return family

    def families(self, kind: Kind, names: Mapping[str, tuple[str, str]], values: Values) -> Iterator[Metric]:
        """Yield a family for each of `names`, which maps a key of the status to a metric's name and help text."""
        for key, (name, help_text) in names.items():
            yield self.family(kind, name, help_text, {endpoint: numbers[key] for endpoint, numbers in values.items()})

    def family(self, kind: Kind, name: str, help_text: str, values: Mapping[str, float]) -> Metric:
        """Return one family with a value for each endpoint."""
        family = kind(f"expertmesh:{name}", help_text, labels=LABELS)
        for endpoint, value in values.items():
            family.add_metric([self.model, endpoint], value)
        return family
