//! What was found, and how it is shown: text for people, JSON for programs, commands for `--fix`.
//!
//! Owns the words ok, warn, fail and skipped. Refuses to know what any check looks at.

use std::io::IsTerminal;

use serde_json::{Value, json};

use super::super::print;
use super::mesh::Matrix;

/// How a check ended, worst last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Verdict {
    Ok,
    Skipped,
    Warn,
    Fail,
}

impl Verdict {
    fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Skipped => "skipped",
            Self::Warn => "warn",
            Self::Fail => "fail",
        }
    }
}

/// The outcome of one check.
#[derive(Clone, Debug)]
pub(super) struct Finding {
    pub(super) check: String,
    pub(super) verdict: Verdict,
    /// A word for programs and tests; empty when all is well.
    pub(super) cause: &'static str,
    /// What was read.
    pub(super) value: String,
    /// Why that is a fault, or why it was not looked at.
    pub(super) reason: String,
    /// The one thing to do.
    pub(super) remedy: String,
    /// The same as a command, where there is one that can be typed.
    pub(super) command: String,
}

impl Finding {
    fn new(
        check: impl Into<String>,
        verdict: Verdict,
        cause: &'static str,
        value: impl Into<String>,
        reason: impl Into<String>,
    ) -> Self {
        Self {
            check: check.into(),
            verdict,
            cause,
            value: value.into(),
            reason: reason.into(),
            remedy: String::new(),
            command: String::new(),
        }
    }

    pub(super) fn ok(check: impl Into<String>, value: impl Into<String>) -> Self {
        Self::new(check, Verdict::Ok, "", value, "")
    }

    pub(super) fn skipped(check: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::new(check, Verdict::Skipped, "", "", reason)
    }

    pub(super) fn warn(
        check: impl Into<String>,
        cause: &'static str,
        value: impl Into<String>,
        reason: impl Into<String>,
    ) -> Self {
        Self::new(check, Verdict::Warn, cause, value, reason)
    }

    pub(super) fn fail(
        check: impl Into<String>,
        cause: &'static str,
        value: impl Into<String>,
        reason: impl Into<String>,
    ) -> Self {
        Self::new(check, Verdict::Fail, cause, value, reason)
    }

    pub(super) fn remedy(mut self, text: impl Into<String>) -> Self {
        self.remedy = text.into();
        self
    }

    pub(super) fn command(mut self, text: impl Into<String>) -> Self {
        self.command = text.into();
        self
    }
}

/// Checks of one subject.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) name: &'static str,
    pub(super) findings: Vec<Finding>,
}

/// All groups.
#[derive(Debug, Default)]
pub(super) struct Report {
    pub(super) groups: Vec<Group>,
    /// Shown before the checks.
    pub(super) mesh: Option<Matrix>,
}

/// Where lines are broken; terminals of 100 columns are common, and logs have no width.
const COLUMNS: usize = 96;
const INDENT: &str = "        ";

impl Report {
    pub(super) fn add(&mut self, name: &'static str, findings: Vec<Finding>) {
        self.groups.push(Group { name, findings });
    }

    fn all(&self) -> impl Iterator<Item = (&'static str, &Finding)> {
        self.groups
            .iter()
            .flat_map(|g| g.findings.iter().map(|f| (g.name, f)))
    }

    fn count(&self, verdict: Verdict) -> usize {
        self.all().filter(|(_, f)| f.verdict == verdict).count()
    }

    /// Whether anything failed.
    pub(super) fn failed(&self) -> bool {
        self.count(Verdict::Fail) > 0
    }

    pub(super) fn print_json(&self) -> std::io::Result<()> {
        let groups: Vec<Value> = self
            .groups
            .iter()
            .map(|g| {
                let checks: Vec<Value> = g
                    .findings
                    .iter()
                    .map(|f| {
                        let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
                        json!({
                            "check": f.check, "status": f.verdict.word(), "cause": some(f.cause),
                            "value": some(&f.value), "reason": some(&f.reason),
                            "remedy": some(&f.remedy), "command": some(&f.command),
                        })
                    })
                    .collect();
                json!({"group": g.name, "checks": checks})
            })
            .collect();
        let mut document = json!({
            "healthy": !self.failed(),
            "ok": self.count(Verdict::Ok), "warn": self.count(Verdict::Warn),
            "fail": self.count(Verdict::Fail), "skipped": self.count(Verdict::Skipped),
            "groups": groups,
        });
        if let (Some(mesh), Some(document)) = (&self.mesh, document.as_object_mut()) {
            document.insert("mesh".to_owned(), mesh.json());
        }
        print::json(&document)
    }

    /// The commands that would mend what was found, each under the reason for it. Nothing is run.
    pub(super) fn print_commands(&self) -> std::io::Result<()> {
        if self.all().all(|(_, f)| f.command.is_empty()) {
            return print::line(
                "# no command would mend anything; `mooncake doctor` shows what was found",
            );
        }
        for (group, f) in self.all().filter(|(_, f)| !f.command.is_empty()) {
            print::line(&format!(
                "# {group}, {}: {}",
                clean(&f.check),
                clean(&f.reason)
            ))?;
            print::line(&clean(&f.command))?;
        }
        Ok(())
    }

    pub(super) fn print_text(&self) -> std::io::Result<()> {
        let colours = std::io::stdout().is_terminal()
            && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
        let paint = |code: &str, text: &str| {
            if colours {
                format!("\x1b[{code}m{text}\x1b[0m")
            } else {
                text.to_owned()
            }
        };
        if let Some(mesh) = &self.mesh {
            print::line(&mesh.text())?;
        }
        let mut first = true;
        for group in self.groups.iter().filter(|g| !g.findings.is_empty()) {
            if !first {
                print::line("")?;
            }
            first = false;
            print::line(&paint("1", group.name))?;
            let width = group.findings.iter().map(|f| f.check.chars().count());
            let width = width.max().unwrap_or(0).min(26);
            for f in &group.findings {
                let (word, code) = match f.verdict {
                    Verdict::Ok => ("ok  ", "32"),
                    Verdict::Skipped => ("--  ", "2"),
                    Verdict::Warn => ("WARN", "1;33"),
                    Verdict::Fail => ("FAIL", "1;31"),
                };
                let shown = if f.verdict == Verdict::Skipped {
                    &f.reason
                } else {
                    &f.value
                };
                let check = format!("{:<width$}", clean(&f.check));
                let start = format!("  {}  {check}  ", paint(code, word));
                let margin = 10 + check.chars().count();
                let mut lines = wrap(&clean(shown), COLUMNS.saturating_sub(margin)).into_iter();
                let line = format!("{start}{}", lines.next().unwrap_or_default());
                print::line(line.trim_end())?;
                for line in lines {
                    print::line(&format!("{:margin$}{line}", ""))?;
                }
                if f.verdict == Verdict::Skipped {
                    continue;
                }
                for line in wrap(&clean(&f.reason), COLUMNS - INDENT.len()) {
                    print::line(&format!("{INDENT}{line}"))?;
                }
                for (n, line) in wrap(&clean(&f.remedy), COLUMNS - INDENT.len() - 2)
                    .iter()
                    .enumerate()
                {
                    let mark = if n == 0 { "→ " } else { "  " };
                    print::line(&paint("36", &format!("{INDENT}{mark}{line}")))?;
                }
                if !f.command.is_empty() {
                    print::line(&paint("36", &format!("{INDENT}  $ {}", clean(&f.command))))?;
                }
            }
        }
        print::line("")?;
        let (failed, warned) = (self.count(Verdict::Fail), self.count(Verdict::Warn));
        let sum = format!(
            "{} checks ok, {failed} failed, {warned} {}, {} skipped",
            self.count(Verdict::Ok),
            if warned == 1 { "warning" } else { "warnings" },
            self.count(Verdict::Skipped)
        );
        let code = match (failed, warned) {
            (0, 0) => "1;32",
            (0, _) => "1;33",
            _ => "1;31",
        };
        print::line(&paint(code, &sum))?;
        for (group, f) in self.all().filter(|(_, f)| f.verdict == Verdict::Fail) {
            print::line(&format!("  {group}: {} ({})", clean(&f.check), f.cause))?;
        }
        Ok(())
    }
}

/// One line without control characters: much of what is shown was said by strangers.
fn clean(text: &str) -> String {
    print::shown(&text.replace('\n', " "))
}

/// Breaks a text between words.
fn wrap(text: &str, columns: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split(' ').filter(|w| !w.is_empty()) {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= columns => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_break_between_words() {
        assert_eq!(wrap("aa bb cc", 5), ["aa bb", "cc"]);
        assert_eq!(wrap("", 5), Vec::<String>::new());
        assert_eq!(wrap("longerthanfive x", 5), ["longerthanfive", "x"]);
        assert_eq!(clean("a\x1b[31m\nb"), "a\\u{1b}[31m b");
    }
}
