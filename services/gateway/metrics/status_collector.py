"""A `StatusCollector` turns the status reports of backbones into Prometheus' metric families."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

LABELS = ["model_name", "backbone"]
Values = Mapping[str, Mapping[str, Any]]  # the values of each backbone, by the backbone's endpoint and the value's key
Kind = type[GaugeMetricFamily] | type[CounterMetricFamily]


class StatusCollector(Collector):
    """A `StatusCollector` makes metric families whose label `backbone` holds the endpoint of each backbone.

    The values of backbones are not added up, because a sum of counters would fall when one backbone restarts.
    """

    def __init__(self, model: str, statuses: Sequence[Mapping[str, Any]]) -> None:
        self.model = model
        self.statuses = {str(status["endpoint"]): status for status in statuses}

    def labelled(self, name: str, help_text: str, label: str, counts: Mapping[str, Mapping[str, int]]) -> Metric:
        """Return a counter that has the additional label `label`.

        `counts[endpoint][value]` is the count of the backbone at `endpoint` for the label value `value`.
        """
        family = CounterMetricFamily(f"expertmesh:{name}", help_text, labels=[*LABELS, label])
        for endpoint, count_by_label in counts.items():
            for label_value, count in count_by_label.items():
                family.add_metric([self.model, endpoint, label_value], count)
        return family

    def families(self, kind: Kind, names: Mapping[str, tuple[str, str]], values: Values) -> Iterator[Metric]:
        """Yield one metric family for each entry of `names`.

        - `kind`: the class of the families, counters or gauges.
        - `names`: maps each key of a backbone's `values` to the metric's name and help text.
        - `values`: maps each backbone's endpoint to the backbone's values, by key.
        """
        for key, (name, help_text) in names.items():
            yield self.family(kind, name, help_text, {endpoint: numbers[key] for endpoint, numbers in values.items()})

    def family(self, kind: Kind, name: str, help_text: str, values: Mapping[str, float]) -> Metric:
        """Return one metric family of the class `kind`, with one value for each endpoint in `values`."""
        family = kind(f"expertmesh:{name}", help_text, labels=LABELS)
        for endpoint, value in values.items():
            family.add_metric([self.model, endpoint], value)
        return family
