//! `husk check`: checks whether this node can run Husk.

mod artefacts;
mod containerd;
mod host;

use std::{fmt::Write, path::Path, process::ExitCode};

use serde::Serialize;

use crate::output::print;

/// Output format of the findings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Output {
    /// One line per finding. A second line contains the remedy if the finding has a remedy.
    Text,
    /// One JSON object.
    Json,
}

/// Severity of a finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// No problem.
    Ok,
    /// Husk runs, but a feature does not work.
    Warn,
    /// Husk does not run.
    Fail,
}

/// Result of one check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Subject of the check.
    pub name: &'static str,
    /// Severity.
    pub status: Status,
    /// Details of the result.
    pub detail: String,
    /// How to solve the problem. Empty if there is no problem.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub remedy: String,
}

impl Finding {
    /// Creates a finding without a problem.
    pub fn ok(name: &'static str, detail: impl Into<String>) -> Self {
        Self { name, status: Status::Ok, detail: detail.into(), remedy: String::new() }
    }

    /// Creates a finding which says that a feature does not work.
    pub fn warn(name: &'static str, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, status: Status::Warn, detail: detail.into(), remedy: remedy.into() }
    }

    /// Creates a finding which says that Husk cannot run.
    pub fn fail(name: &'static str, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, status: Status::Fail, detail: detail.into(), remedy: remedy.into() }
    }
}

/// Runs all checks and prints the findings. The exit code tells whether Husk can run.
pub fn main(config: &Path, output: Output) -> ExitCode {
    let (configuration, mut findings) = artefacts::configuration(config);
    findings.extend(artefacts::images(&configuration));
    findings.extend(host::all(&configuration));
    findings.extend(containerd::all());
    let works = findings.iter().all(|finding| finding.status != Status::Fail);
    let text = match output {
        Output::Text => text(&findings, works),
        Output::Json => format!("{:#}\n", serde_json::json!({ "ok": works, "findings": findings })),
    };
    match print(&text) == ExitCode::SUCCESS && works {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}

fn text(findings: &[Finding], works: bool) -> String {
    let width = findings.iter().map(|finding| finding.name.len()).max().unwrap_or_default();
    let mut text = String::new();
    for Finding { name, status, detail, remedy } in findings {
        let status = match status {
            Status::Ok => "ok",
            Status::Warn => "warn",
            Status::Fail => "FAIL",
        };
        let _ = writeln!(text, "{status:4}  {name:width$}  {detail}");
        if !remedy.is_empty() {
            let _ = writeln!(text, "{:4}  {:width$}  → {remedy}", "", "");
        }
    }
    let verdict = if works { "This node can run Husk." } else { "This node cannot run Husk yet." };
    let _ = writeln!(text, "{verdict}");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_output_has_remedies_below_findings() {
        let findings = [Finding::ok("kvm", "there"), Finding::fail("containerd", "not found", "install it")];
        let expected = "ok    kvm         there\nFAIL  containerd  not found\n                  → install it\n\
                        This node cannot run Husk yet.\n";
        assert_eq!(text(&findings, false), expected);
        let json = serde_json::to_value(&findings).unwrap();
        assert_eq!(json[0], serde_json::json!({"name": "kvm", "status": "ok", "detail": "there"}));
        assert_eq!(json[1]["remedy"], "install it");
    }
}
