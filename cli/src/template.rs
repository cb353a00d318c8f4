//! `husk template`: lists, makes and removes the templates of this node.

use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use husk_config::template::{ARGV0, CLASS, Class, MEMORY, STATE, STORE, is_complete};
use serde::Serialize;

use crate::output::{age, columns};

/// Name of the shim's program, which makes templates. containerd finds it in its PATH, too.
const SHIM: &str = "containerd-shim-husk-v2";

/// Output format of the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Output {
    /// A table.
    Text,
    /// A JSON array.
    Json,
}

/// Reason why a request fails.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The shim's program cannot be executed.
    #[error("failed to execute {SHIM}: is its directory in PATH?")]
    Execute(#[source] io::Error),
    /// A template cannot be removed.
    #[error("failed to remove {}", path.display())]
    Remove {
        /// The directory of the template.
        path: PathBuf,
        /// The OS error.
        #[source]
        source: io::Error,
    },
}

/// One row of the list.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Row {
    name: String,
    #[serde(flatten)]
    class: Class,
    /// Size of the files in KiB.
    size_kib: u64,
    /// Time at which the template was made, in seconds since 1970.
    made: u64,
}

/// Returns the list of templates.
pub fn list(output: Output) -> String {
    let rows = rows(Path::new(STORE));
    match output {
        Output::Text => table(&rows, SystemTime::now()),
        Output::Json => format!("{:#}\n", serde_json::json!(rows)),
    }
}

/// Makes the template for pods without limits, and does not return if the shim's program can be executed.
///
/// # Errors
/// [`TemplateError::Execute`].
pub fn build(config: &Path) -> TemplateError {
    TemplateError::Execute(Command::new(SHIM).arg0(ARGV0).env("HUSK_CONFIG", config).exec())
}

/// Removes all templates. Guests that were made from them go on.
///
/// # Errors
/// [`TemplateError::Remove`].
pub fn clear() -> Result<(), TemplateError> {
    for (name, _) in complete(Path::new(STORE)) {
        let path = Path::new(STORE).join(name);
        fs::remove_dir_all(&path).map_err(|source| TemplateError::Remove { path, source })?;
    }
    Ok(())
}

/// Returns the names and directories of the complete templates.
fn complete(store: &Path) -> Vec<(String, PathBuf)> {
    let entries = fs::read_dir(store).into_iter().flatten().flatten();
    let named = entries.filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path())));
    named.filter(|(name, _)| is_complete(name)).collect()
}

fn rows(store: &Path) -> Vec<Row> {
    let row = |(name, path): (String, PathBuf)| {
        let class = serde_json::from_slice(&fs::read(path.join(CLASS)).ok()?).ok()?;
        let files = [STATE, MEMORY].map(|file| fs::metadata(path.join(file)));
        let size_kib = files.iter().flatten().map(|file| file.len().div_ceil(1024)).sum();
        let [state, _] = files;
        let made = state.ok()?.modified().ok()?.duration_since(SystemTime::UNIX_EPOCH).ok()?.as_secs();
        Some(Row { name, class, size_kib, made })
    };
    let mut rows: Vec<Row> = complete(store).into_iter().filter_map(row).collect();
    rows.sort_by(|one, other| (one.made, &one.name).cmp(&(other.made, &other.name)));
    rows
}

fn table(rows: &[Row], now: SystemTime) -> String {
    let mut lines = vec![["TEMPLATE", "VCPUS", "MEMORY", "NAMESPACE", "SIZE", "AGE"].map(str::to_owned)];
    for Row { name, class, size_kib, made } in rows {
        let since = now.duration_since(SystemTime::UNIX_EPOCH + Duration::from_secs(*made)).unwrap_or_default();
        lines.push([
            name.chars().take(13).collect(),
            class.vcpus.to_string(),
            format!("{} MiB", class.memory_mib),
            if class.namespace.is_empty() { "-".into() } else { class.namespace.clone() },
            format!("{} MiB", size_kib / 1024),
            age(since),
        ]);
    }
    columns(&lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complete_templates_are_listed_from_the_oldest() {
        let store = tempfile::tempdir().unwrap();
        let class = |memory_mib: u64| Class {
            vcpus: 1,
            max_vcpus: 3,
            memory_mib,
            max_memory_mib: 4096,
            huge_mib: 0,
            namespace: String::new(),
        };
        for (name, memory_mib, age) in
            [("b".repeat(64), 1024, 10), ("a".repeat(64), 256, 90), ("partial-c".into(), 1, 0)]
        {
            let path = store.path().join(name);
            fs::create_dir(&path).unwrap();
            fs::write(path.join(CLASS), serde_json::to_vec(&class(memory_mib)).unwrap()).unwrap();
            fs::write(path.join(MEMORY), vec![0; 3 << 20]).unwrap();
            let state = fs::File::create(path.join(STATE)).unwrap();
            state.set_modified(SystemTime::now() - Duration::from_secs(age)).unwrap();
        }
        let rows = rows(store.path());
        assert_eq!(rows.iter().map(|row| row.class.memory_mib).collect::<Vec<_>>(), [256, 1024]);
        let text = table(&rows, SystemTime::now());
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        assert!(lines[0].starts_with("TEMPLATE       VCPUS  MEMORY"), "{text}");
        assert!(lines[1].starts_with("aaaaaaaaaaaaa  1      256 MiB   -          3 MiB  "), "{text}");
    }
}
