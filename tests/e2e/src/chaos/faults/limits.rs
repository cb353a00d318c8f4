//! Faults of limits: no fd, no pid, no memory, no space in /run, no inotify.

use std::fs;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sys::statvfs::statvfs;

use super::{Armed, Field, Hold, write_until};
use crate::chaos::plan::Fault;
use crate::vm;

/// Free space in a full `/run`, in bytes.
const FREE: u64 = 16 << 10;

/// Lowers a limit.
pub fn arm(fault: Fault, field: &mut Field<'_>) -> Result<Armed, String> {
    let hold = Hold::Short(field.seconds(2.0, 8.0));
    match fault {
        Fault::ShimFds => limit_fds(field.shim()?, hold),
        Fault::VmmFds => limit_fds(field.vmm()?, hold),
        Fault::PodPids => {
            let cgroup = field.cgroup()?;
            let used = fs::read_to_string(cgroup.join("pids.current")).map_err(|error| error.to_string())?;
            write_until(cgroup.join("pids.max"), used.trim(), hold)
        }
        Fault::PodMemory => {
            let cgroup = field.cgroup()?;
            let used = fs::read_to_string(cgroup.join("memory.current")).map_err(|error| error.to_string())?;
            let used: u64 = used.trim().parse().map_err(|_| "memory.current is not a number")?;
            // A limit below the use would kill several processes at once (`memory_max_write` in mm/memcontrol.c).
            write_until(cgroup.join("memory.max"), &(used + (2 << 20)).to_string(), Hold::Life)
        }
        Fault::RunFull => fill_run(hold),
        Fault::NoInotify => {
            let dir = Path::new("/proc/sys/fs/inotify");
            let mut instances = write_until(dir.join("max_user_instances"), "1", hold)?;
            let mut watches = write_until(dir.join("max_user_watches"), "1", hold)?;
            Ok(Armed::new(hold, move || {
                instances.heal();
                watches.heal();
            }))
        }
        _ => Err(format!("{fault:?} is no fault of a limit")),
    }
}

/// Leaves a process two free fds.
fn limit_fds(pid: i32, hold: Hold) -> Result<Armed, String> {
    let fds = PathBuf::from(format!("/proc/{pid}/fd"));
    let numbers = fs::read_dir(fds).map_err(|error| error.to_string())?.flatten();
    let highest = numbers.filter_map(|entry| entry.file_name().to_str()?.parse::<u64>().ok()).max().unwrap_or(3);
    let old = vm::try_set_fd_limit(pid, highest + 3).map_err(|error| error.to_string())?;
    Ok(Armed::new(hold, move || {
        let _ = vm::try_set_fd_limit(pid, old);
    }))
}

/// Makes `/run` as small as its content.
fn fill_run(hold: Hold) -> Result<Armed, String> {
    let stat = statvfs("/run").map_err(|error| error.to_string())?;
    let size = stat.blocks() * stat.fragment_size();
    let used = size - stat.blocks_free() * stat.fragment_size();
    resize_run(used + FREE)?;
    Ok(Armed::new(hold, move || resize_run(size).expect("failed to give /run its size back")))
}

fn resize_run(size: u64) -> Result<(), String> {
    let options = format!("size={size}");
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("run"), "/run", Some("tmpfs"), flags, Some(options.as_str()))
        .map_err(|error| format!("failed to remount /run with {options}: {error}"))
}
