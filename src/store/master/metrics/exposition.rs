//! Prometheus' text format, version 0.0.4.

use std::fmt::Write;

use crate::base::histogram::Counted;

/// The content type of what this writes.
pub(crate) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Labels of a series.
pub(super) type Labels<'a> = &'a [(&'a str, &'a str)];

/// Writes families one after the other: a head, then its series.
#[derive(Default)]
pub(super) struct Writer {
    pub(super) text: String,
}

impl Writer {
    pub(super) fn head(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    pub(super) fn series(&mut self, name: &str, labels: Labels<'_>, value: u64) {
        self.text.push_str(name);
        self.labels(labels, None);
        let _ = writeln!(self.text, " {value}");
    }

    /// A family of one series without labels.
    pub(super) fn single(&mut self, name: &str, kind: &str, help: &str, value: u64) {
        self.head(name, kind, help);
        self.series(name, &[], value);
    }

    /// The series of a histogram; its values are divided by `scale`.
    pub(super) fn histogram(
        &mut self,
        name: &str,
        labels: Labels<'_>,
        counted: &Counted,
        scale: f64,
    ) {
        let mut total = 0;
        for (i, count) in counted.counts.iter().enumerate() {
            total = u64::saturating_add(total, *count);
            let bound = counted
                .bounds
                .get(i)
                .map_or("+Inf".to_owned(), |b| (*b as f64 / scale).to_string());
            let _ = write!(self.text, "{name}_bucket");
            self.labels(labels, Some(&bound));
            let _ = writeln!(self.text, " {total}");
        }
        let _ = write!(self.text, "{name}_sum");
        self.labels(labels, None);
        let _ = writeln!(self.text, " {}", counted.sum as f64 / scale);
        let _ = write!(self.text, "{name}_count");
        self.labels(labels, None);
        let _ = writeln!(self.text, " {total}");
    }

    fn labels(&mut self, labels: Labels<'_>, bound: Option<&str>) {
        let all = labels.iter().copied().chain(bound.map(|b| ("le", b)));
        let mut first = true;
        for (name, value) in all {
            self.text.push(if first { '{' } else { ',' });
            first = false;
            let _ = write!(self.text, "{name}=\"");
            for c in value.chars() {
                match c {
                    '\\' => self.text.push_str("\\\\"),
                    '"' => self.text.push_str("\\\""),
                    '\n' => self.text.push_str("\\n"),
                    c => self.text.push(c),
                }
            }
            self.text.push('"');
        }
        if !first {
            self.text.push('}');
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::histogram::Histogram;

    #[test]
    fn families() {
        let mut w = Writer::default();
        w.single("a_total", "counter", "A.", 3);
        w.head("b", "gauge", "B.");
        w.series("b", &[("segment", "x\"\\\n")], 1);
        let histogram = Histogram::new(&[1000, 2_000_000]);
        histogram.observe(1500);
        w.head("c_seconds", "histogram", "C.");
        w.histogram("c_seconds", &[("op", "get")], &histogram.now(), 1e6);
        assert_eq!(
            w.text,
            "# HELP a_total A.\n# TYPE a_total counter\na_total 3\n\
             # HELP b B.\n# TYPE b gauge\nb{segment=\"x\\\"\\\\\\n\"} 1\n\
             # HELP c_seconds C.\n# TYPE c_seconds histogram\n\
             c_seconds_bucket{op=\"get\",le=\"0.001\"} 0\n\
             c_seconds_bucket{op=\"get\",le=\"2\"} 1\n\
             c_seconds_bucket{op=\"get\",le=\"+Inf\"} 1\n\
             c_seconds_sum{op=\"get\"} 0.0015\nc_seconds_count{op=\"get\"} 1\n"
        );
    }
}
