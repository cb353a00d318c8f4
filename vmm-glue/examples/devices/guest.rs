//! The program in the guest: mounts file systems, listens on vsock and runs the tests that the host requests.

use std::fs;
use std::io::Result;
use std::io::Seek;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use husk_base::sys::{vsock, xattr};
use nix::fcntl::{Flock, FlockArg};
use nix::mount::MsFlags;
use nix::sys::socket::SockFlag;

use super::*;

pub fn main() -> super::Result<()> {
    mount("proc", "/proc", "proc")?;
    mount("dev", "/dev", "devtmpfs")?;
    mount("sys", "/sys", "sysfs")?;
    mount("husk", "/share", "virtiofs")?;
    data();
    let listener = vsock::listen(PORT, SockFlag::empty())?;
    loop {
        let stream = match vsock::accept(listener.as_fd(), SockFlag::empty()) {
            Ok((connection, _)) => UnixStream::from(connection),
            Err(error) => {
                println!("failed to accept a connection: {error}");
                continue;
            }
        };
        std::thread::spawn(move || {
            if let Err(error) = serve(stream) {
                println!("failed to serve a connection: {error}");
            }
        });
    }
}

fn mount(source: &str, target: &str, kind: &str) -> Result<()> {
    fs::create_dir_all(target)?;
    nix::mount::mount(Some(source), target, Some(kind), MsFlags::empty(), None::<&str>)?;
    Ok(())
}

/// Returns the test data. The data is computed only once, because computing it takes a long time in an emulated node.
fn data() -> &'static [u8] {
    static DATA: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
    DATA.get_or_init(|| pattern(64 * MIB))
}

fn serve(mut stream: UnixStream) -> Result<()> {
    let mut command = [0];
    if stream.read(&mut command)? == 0 {
        return Ok(());
    }
    match &command {
        b"e" => {
            let mut buffer = vec![0; 100_000];
            loop {
                match stream.read(&mut buffer)? {
                    0 => return Ok(()),
                    count => stream.write_all(&buffer[..count])?,
                }
            }
        }
        b"s" => {
            let mut received = Vec::with_capacity(64 * MIB);
            stream.read_to_end(&mut received)?;
            stream.write_all(if received == data() { b"same" } else { b"different" })
        }
        b"g" => match stream.write_all(data()) {
            // The reader may close the connection early.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EPIPE | libc::ECONNRESET)) => Ok(()),
            other => other,
        },
        _ => {
            let mut name = String::new();
            stream.read_to_string(&mut name)?;
            let answer = match test(&name) {
                Ok(true) => "ok".to_owned(),
                Ok(false) => "the test found a wrong result in the guest".to_owned(),
                Err(error) => error.to_string(),
            };
            stream.write_all(answer.as_bytes())
        }
    }
}

fn test(name: &str) -> Result<bool> {
    let content = &data()[..5 * MIB];
    match name {
        "files" => {
            let unchanged = fs::read("/share/hello")? == content && fs::read("/share/hello")? == content;
            fs::write("/share/written", &content[..MIB])?;
            File::open("/share/written")?.sync_all()?;
            fs::create_dir("/share/directory")?;
            fs::rename("/share/written", "/share/directory/written")?;
            std::os::unix::fs::symlink("directory/written", "/share/link")?;
            let linked = fs::read("/share/link")? == content[..MIB];
            fs::rename("/share/directory/written", "/share/written")?;
            fs::remove_dir("/share/directory")?;
            Ok(unchanged && linked)
        }
        "volume" => Ok(fs::read_to_string("/share/late")? == "made after the mount"),
        "many" => {
            let mut count = 0;
            for entry in fs::read_dir("/share/many")? {
                let entry = entry?;
                count += 1;
                if fs::read_to_string(entry.path())? != entry.file_name().to_string_lossy() {
                    return Ok(false);
                }
            }
            Ok(count == 1000)
        }
        "permissions" => {
            fs::write("/share/mine", "x")?;
            std::os::unix::fs::chown("/share/mine", Some(1000), Some(1001))?;
            fs::set_permissions("/share/mine", fs::Permissions::from_mode(0o4755))?;
            let meta = fs::metadata("/share/mine")?;
            let before = (meta.uid(), meta.gid(), meta.mode()) == (1000, 1001, 0o104_755);
            let set = xattr::set(Path::new("/share/mine"), c"user.husk", b"value");
            println!("result of setting the attribute user.husk of /share/mine: {set:?}");
            // Create a file as another user. The VMM's virtio-fs server must act as that user, and not as root.
            fs::create_dir("/share/open")?;
            fs::set_permissions("/share/open", fs::Permissions::from_mode(0o1777))?;
            // SAFETY: the calls take no pointers. A raw system call changes only the ids of this thread, and nothing
            // else in this thread depends on these ids.
            unsafe {
                libc::syscall(libc::SYS_setresgid, 2000, 2000, 2000);
                libc::syscall(libc::SYS_setresuid, 2000, 2000, 2000);
            }
            fs::write("/share/open/theirs", "y")?;
            let meta = fs::metadata("/share/open/theirs")?;
            let refused = fs::write("/share/mine", "z").is_err();
            Ok(before && refused && (meta.uid(), meta.gid()) == (2000, 2000))
        }
        // Each lookup is one request, because missing names are not cached.
        "lookups" => Ok((0..500).all(|number| fs::metadata(format!("/share/none{number}")).is_err())),
        "disk" => {
            let serial = fs::read_to_string("/sys/block/vda/serial")?;
            let mtu = fs::read_to_string("/sys/class/net/eth0/mtu")?;
            let mut disk = File::options().read(true).write(true).open("/dev/vda")?;
            disk.write_all(&data()[..8 * MIB])?;
            disk.sync_all()?;
            drop(disk);
            // Read without the page cache, so that the data comes from the device.
            let mut direct = File::options().read(true).custom_flags(libc::O_DIRECT).open("/dev/vda")?;
            let layout = std::alloc::Layout::from_size_align(MIB, 4096).map_err(std::io::Error::other)?;
            // SAFETY: the layout is not empty. The memory is zeroed, has the given length and alignment, and is never
            // freed.
            let buffer = unsafe { std::slice::from_raw_parts_mut(std::alloc::alloc_zeroed(layout), MIB) };
            for part in data()[..8 * MIB].chunks(MIB) {
                direct.read_exact(buffer)?;
                if buffer != part {
                    return Ok(false);
                }
            }
            let (start, length) = (MIB as u64, MIB as u64);
            // SAFETY: BLKDISCARD reads two u64, to which the argument is a valid reference.
            let discard = |disk: &File| unsafe { libc::ioctl(disk.as_raw_fd(), 0x1277, &[start, length]) };
            let discarded = discard(&direct);
            let discarded_there = discard(&File::options().write(true).open("/dev/vda")?);
            direct.seek(std::io::SeekFrom::Start(start))?;
            direct.read_exact(buffer)?;
            let zero = buffer.iter().all(|&byte| byte == 0);
            println!("disk serial {serial:?}, MTU {mtu:?}");
            println!("results of BLKDISCARD: {discarded} on a read-only fd, {discarded_there} on a writable fd");
            Ok(serial == "disk-0" && mtu == "1400\n" && discarded_there == 0 && zero)
        }
        "tcp" => {
            interface::up("eth0", interface::GUEST)?;
            let mut stream = std::net::TcpStream::connect((interface::HOST, interface::PORT))?;
            stream.write_all(&data()[..16 * MIB])?;
            let mut received = vec![0; 16 * MIB];
            stream.read_exact(&mut received)?;
            Ok(received == data()[..16 * MIB])
        }
        "balloon" => {
            let inflated = || {
                fs::read_to_string("/proc/vmstat").map(|text| {
                    let count = text.lines().find_map(|line| line.strip_prefix("balloon_inflate "));
                    count.and_then(|count| count.parse::<usize>().ok())
                })
            };
            for _ in 0..200 {
                if inflated()?.ok_or(std::io::ErrorKind::Unsupported)? >= 64 * MIB / 4096 {
                    return Ok(true);
                }
                std::thread::sleep(std::time::Duration::from_millis(50));
            }
            Ok(false)
        }
        "locks" => {
            let file = File::create("/share/lock")?;
            let other = File::open("/share/lock")?;
            let first = Flock::lock(file, FlockArg::LockExclusive);
            let second = Flock::lock(other, FlockArg::LockExclusiveNonblock);
            Ok(first.is_ok() && second.is_err())
        }
        "rng" => {
            let Ok(mut rng) = File::open("/dev/hwrng") else {
                println!("no /dev/hwrng in this kernel");
                return Ok(true);
            };
            let mut bytes = [0; 64];
            rng.read_exact(&mut bytes)?;
            Ok(bytes != [0; 64])
        }
        _ => Ok(false),
    }
}
