//! Finds Husk's processes on the node (VMM and shim of a container) and reads their memory use.

use std::fs;

use husk_base::sys::resource::{self, Limit};
use nix::unistd::Pid;

/// Returns the pids of all VMM processes, whose argv[0] is `husk-vmm`.
pub fn vmm_pids() -> Vec<i32> {
    processes_with(|arguments| arguments.first().is_some_and(|first| first == "husk-vmm"))
}

/// Returns whether any shim, launcher or VMM runs.
pub fn husk_runs() -> bool {
    let is_husk = |first: &String| first == "husk-vmm" || first.contains("containerd-shim-husk");
    !processes_with(|arguments| arguments.first().is_some_and(is_husk)).is_empty()
}

/// Returns the pids of the VMMs of one container. The VMMs are children of the container's shims.
pub fn vmm_pids_of(id: &str) -> Vec<i32> {
    let shims = shim_pids_of(id);
    vmm_pids().into_iter().filter(|pid| parent(*pid).is_some_and(|parent| shims.contains(&parent))).collect()
}

/// Returns the pids of the shims that were started for container `id`, without their launchers.
pub fn shim_pids_of(id: &str) -> Vec<i32> {
    of_shim(id).into_iter().filter(|pid| !is_launcher(*pid)).collect()
}

/// Returns the pids of the launchers of the shims that were started for container `id`.
pub fn launcher_pids_of(id: &str) -> Vec<i32> {
    of_shim(id).into_iter().filter(|pid| is_launcher(*pid)).collect()
}

fn is_launcher(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "husk-launcher")
}

/// Returns the pids of the shims for runc that were started for container `id`.
pub fn runc_shim_pids_of(id: &str) -> Vec<i32> {
    of_program("containerd-shim-runc", id)
}

fn of_shim(id: &str) -> Vec<i32> {
    of_program("containerd-shim-husk", id)
}

fn of_program(program: &str, id: &str) -> Vec<i32> {
    processes_with(|arguments| {
        arguments.first().is_some_and(|first| first.contains(program))
            && arguments.windows(2).any(|pair| pair[0] == "-id" && pair[1] == id)
    })
}

/// Sets the soft fd limit (RLIMIT_NOFILE) of a process. Returns the previous limit.
#[track_caller]
pub fn set_fd_limit(pid: i32, limit: u64) -> u64 {
    try_set_fd_limit(pid, limit).expect("failed to set the fd limit")
}

/// Like [`set_fd_limit`], but returns an error, for example if the process has ended.
pub fn try_set_fd_limit(pid: i32, limit: u64) -> std::io::Result<u64> {
    let pid = Pid::from_raw(pid);
    let old = resource::limit(pid, libc::RLIMIT_NOFILE, None)?;
    resource::limit(pid, libc::RLIMIT_NOFILE, Some(Limit { soft: limit, ..old }))?;
    Ok(old.soft)
}

/// Returns the number of threads of a process that wait in the kernel and cannot be interrupted (state D in proc(5)).
pub fn waiting_threads(pid: i32) -> usize {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let stats = threads.filter_map(|thread| fs::read_to_string(thread.path().join("stat")).ok());
    stats.filter(|stat| stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('D'))).count()
}

fn processes_with(wanted: impl Fn(&[String]) -> bool) -> Vec<i32> {
    let mut pids = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let arguments: Vec<String> =
            line.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect();
        if wanted(&arguments) {
            pids.push(pid);
        }
    }
    pids
}

/// Returns the pid of the parent of a process.
pub fn parent(pid: i32) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.split_whitespace().nth(1)?.parse().ok()
}

/// Proportional set size (PSS) of a process, in KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// PSS of guest memory: the mappings that are excluded from core dumps (MADV_DONTDUMP). The VMM sets this advice
    /// only for guest memory. Guest memory cannot be identified by size, because advice about huge pages splits
    /// the mapping of guest memory.
    pub guest: u64,
    /// The anonymous part of guest memory. The rest is shared with the template and with its other guests.
    pub guest_anonymous: u64,
    /// PSS of all other mappings.
    pub other: u64,
}

/// Reads the PSS of a process.
pub fn memory(pid: i32) -> std::io::Result<Memory> {
    Ok(parse_smaps(&fs::read_to_string(format!("/proc/{pid}/smaps"))?))
}

/// Parses smaps. `VmFlags` is the last line of each mapping (Linux, fs/proc/task_mmu.c); `dd` is "do not include area
/// into core dump".
fn parse_smaps(smaps: &str) -> Memory {
    let mut memory = Memory { guest: 0, guest_anonymous: 0, other: 0 };
    let (mut pss, mut anonymous) = (0, 0);
    let kib = |value: &str| value.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0);
    for line in smaps.lines() {
        let Some((key, value)) = line.split_once(':') else { continue };
        match key {
            "Pss" => pss = kib(value),
            "Anonymous" => anonymous = kib(value),
            "VmFlags" if value.split_whitespace().any(|flag| flag == "dd") => {
                memory.guest += pss;
                memory.guest_anonymous += anonymous;
            }
            "VmFlags" => memory.other += pss,
            _ => {}
        }
    }
    memory
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_separated_from_other_memory() {
        let smaps = "7f00-7f01 rw-p 0 00:00 0\nSize: 262144 kB\nPss: 30000 kB\nPss_Dirty: 30000 kB\nAnonymous: 20000 kB\n\
                     VmFlags: rd wr mr mw me nr dd nh\n\
                     5500-5501 r-xp 0 08:01 3 /usr/local/bin/x\nSize: 4096 kB\nPss: 1500 kB\nVmFlags: rd ex mr mw me\n";
        assert_eq!(parse_smaps(smaps), Memory { guest: 30000, guest_anonymous: 20000, other: 1500 });
    }
}
