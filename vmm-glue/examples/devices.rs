//! Boots a guest whose only program is this one, and tries the devices against its Linux drivers.
//!
//! Usage: `devices KERNEL`. Built static, the same binary is the tester, the VMM process and the guest's `/init`.

use std::error::Error;
use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use husk_vmm::client::{ARGV0, CONTROL_FD, SpawnOptions, Vmm, spawn};
use husk_vmm::config::{FdIndex, ShareConfig, VmConfig};
use husk_vmm::control::Call;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const PORT: u32 = 1024;
const MIB: usize = 1 << 20;

fn main() -> Result<()> {
    if std::process::id() == 1 {
        return guest::main();
    }
    let mut arguments = std::env::args();
    if arguments.next().as_deref() == Some(ARGV0) {
        // SAFETY: the spawner put the control socket there, and nothing else uses it.
        husk_vmm::child::main(unsafe { OwnedFd::from_raw_fd(CONTROL_FD) })
    }
    let kernel = arguments.next().ok_or("usage: devices KERNEL")?;
    let share = tempfile::tempdir()?;
    prepare_share(share.path())?;
    let mut vmm = boot(&kernel, share.path())?;

    step("connect, refused", || match vmm.connect(9) {
        Err(error) if error.to_string().contains("refused") => Ok(()),
        other => Err(format!("{other:?}").into()),
    })?;
    let data = pattern(64 * MIB);
    step("64 MiB to the guest", || {
        let mut stream = open(&mut vmm, b"s")?;
        stream.write_all(&data)?;
        stream.shutdown(Shutdown::Write)?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        check(answer == [(data.len() as u64).to_le_bytes(), sum(&data).to_le_bytes()].concat())
    })?;
    step("64 MiB from the guest", || {
        let mut stream = open(&mut vmm, b"g")?;
        let mut got = Vec::with_capacity(data.len());
        stream.read_to_end(&mut got)?;
        check(got == data)
    })?;
    step("16 MiB both ways at once", || echo(&open(&mut vmm, b"e")?, &data[..16 * MIB]))?;
    step("200 quick connections", || (0..200).try_for_each(|_| echo(&open(&mut vmm, b"e")?, b"a few bytes")))?;
    step("8 at once, 4 MiB each, both ways", || {
        let streams = (0..8).map(|_| open(&mut vmm, b"e")).collect::<Result<Vec<_>>>()?;
        std::thread::scope(|scope| {
            let echoes: Vec<_> = streams
                .iter()
                .map(|stream| scope.spawn(|| echo(stream, &data[..4 * MIB]).map_err(|error| error.to_string())))
                .collect();
            echoes.into_iter().try_for_each(|echo| Ok(echo.join().map_err(|_| "panic")??))
        })
    })?;
    step("a reader that sleeps, and another beside it", || {
        let mut slow = open(&mut vmm, b"g")?;
        echo(&open(&mut vmm, b"e")?, &data[..MIB])?;
        let mut got = Vec::new();
        slow.read_to_end(&mut got)?;
        check(got == data)
    })?;
    step("100 streams closed in the middle", || {
        for _ in 0..100 {
            let mut stream = open(&mut vmm, b"g")?;
            stream.read_exact(&mut [0; 1000])?;
        }
        echo(&open(&mut vmm, b"e")?, b"still there")
    })?;
    for what in ["files", "volume", "many", "permissions", "locks", "rng"] {
        if what == "volume" {
            std::fs::write(share.path().join("late"), "made after the mount")?;
        }
        step(what, || {
            let mut stream = open(&mut vmm, b"t")?;
            stream.write_all(what.as_bytes())?;
            stream.shutdown(Shutdown::Write)?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            if answer == "ok" { Ok(()) } else { Err(answer.into()) }
        })?;
    }
    check(std::fs::read(share.path().join("written"))? == data[..MIB])?;
    println!("all good");
    Ok(())
}

fn step(name: &str, run: impl FnOnce() -> Result<()>) -> Result<()> {
    let start = Instant::now();
    let result = run();
    println!("{:8.1} ms  {name}{}", start.elapsed().as_secs_f64() * 1e3, if result.is_ok() { "" } else { ": FAILED" });
    result
}

fn check(right: bool) -> Result<()> {
    if right { Ok(()) } else { Err("not what was expected".into()) }
}

fn pattern(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_u32;
    let mut bytes = Vec::with_capacity(length);
    while bytes.len() < length {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        bytes.extend(state.to_le_bytes());
    }
    bytes
}

fn sum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, &byte| (sum ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

fn echo(stream: &UnixStream, data: &[u8]) -> Result<()> {
    let (mut reader, mut writer) = (stream, stream);
    let got = std::thread::scope(|scope| {
        let writing = scope.spawn(move || {
            writer.write_all(data)?;
            writer.shutdown(Shutdown::Write)
        });
        let mut got = Vec::with_capacity(data.len());
        reader.read_to_end(&mut got)?;
        writing.join().map_err(|_| "panic")??;
        Ok::<_, Box<dyn Error>>(got)
    })?;
    check(got == data)
}

fn open(vmm: &mut Vmm, command: &[u8]) -> Result<UnixStream> {
    let mut stream = vmm.connect(PORT)?;
    stream.write_all(command)?;
    Ok(stream)
}

fn prepare_share(root: &std::path::Path) -> Result<()> {
    std::fs::write(root.join("hello"), pattern(5 * MIB))?;
    std::fs::create_dir(root.join("many"))?;
    for number in 0..1000 {
        std::fs::write(root.join("many").join(number.to_string()), number.to_string())?;
    }
    Ok(())
}

fn boot(kernel: &str, root: &std::path::Path) -> Result<Vmm> {
    let start = Instant::now();
    let spawned = spawn(SpawnOptions::default())?;
    let mut vmm = Vmm::new(spawned.control);
    let kvm = File::options().read(true).write(true).open("/dev/kvm")?;
    let kernel = File::open(kernel)?;
    let mut initrd = tempfile::tempfile()?;
    initrd.write_all(&cpio(&std::fs::read("/proc/self/exe")?))?;
    let (console, end) = std::io::pipe()?;
    std::thread::spawn(move || {
        let mut console = console;
        let _ = std::io::copy(&mut console, &mut std::io::stderr());
    });
    let config = VmConfig {
        id: "devices".into(),
        vcpus: 2,
        memory_mib: 512,
        kvm: FdIndex(0),
        kernel: FdIndex(1),
        initrd: FdIndex(2),
        kernel_params: String::new(),
        console: FdIndex(3),
        share: Some(ShareConfig { tag: "husk".into(), root: root.display().to_string(), workers: 2 }),
        vsock_cid: 3,
        net: vec![],
        blk: vec![],
        balloon: true,
        spare_slots: 0,
    };
    vmm.call(Call::Create(Box::new(config)), &[kvm.as_fd(), kernel.as_fd(), initrd.as_fd(), end.as_fd()])?;
    println!("{:8.1} ms  created", start.elapsed().as_secs_f64() * 1e3);
    vmm.call(Call::Resume, &[])?;
    // The first connection waits for the driver; until the guest listens it is refused.
    while vmm.connect(PORT).is_err() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    println!("{:8.1} ms  guest listens", start.elapsed().as_secs_f64() * 1e3);
    Ok(vmm)
}

/// An initial RAM file system with `/init` and `/dev/console` (newc format).
fn cpio(init: &[u8]) -> Vec<u8> {
    let mut archive = Vec::new();
    let entries: [(&str, u32, (u32, u32), &[u8]); 4] = [
        ("dev", 0o040_755, (0, 0), &[]),
        ("dev/console", 0o020_600, (5, 1), &[]),
        ("init", 0o100_755, (0, 0), init),
        ("TRAILER!!!", 0, (0, 0), &[]),
    ];
    for (inode, (name, mode, (major, minor), data)) in entries.into_iter().enumerate() {
        let fields =
            [inode as u32 + 1, mode, 0, 0, 1, 0, data.len() as u32, 0, 0, major, minor, name.len() as u32 + 1, 0];
        archive.extend(b"070701");
        for field in fields {
            archive.extend(format!("{field:08x}").bytes());
        }
        archive.extend(name.bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend(data);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
    archive
}

/// The guest's side.
mod guest {
    use std::ffi::CString;
    use std::fs;
    use std::io::Result;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::*;

    pub fn main() -> super::Result<()> {
        mount("proc", "/proc", "proc")?;
        mount("dev", "/dev", "devtmpfs")?;
        mount("husk", "/share", "virtiofs")?;
        // SAFETY: plain system calls on a descriptor of ours; the address is a valid sockaddr_vm.
        let listener = unsafe {
            let fd = libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0);
            let mut address: libc::sockaddr_vm = std::mem::zeroed();
            address.svm_family = libc::AF_VSOCK as u16;
            address.svm_port = PORT;
            address.svm_cid = libc::VMADDR_CID_ANY;
            libc::bind(fd, (&raw const address).cast(), size_of_val(&address) as u32);
            libc::listen(fd, 128);
            OwnedFd::from_raw_fd(fd)
        };
        loop {
            // SAFETY: accepts on our listener; the descriptor it returns is ours.
            let fd = unsafe { libc::accept(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut()) };
            if fd < 0 {
                println!("accept: {}", std::io::Error::last_os_error());
                continue;
            }
            // SAFETY: as above.
            let stream = UnixStream::from(unsafe { OwnedFd::from_raw_fd(fd) });
            std::thread::spawn(move || {
                if let Err(error) = serve(stream) {
                    println!("guest: {error}");
                }
            });
        }
    }

    fn mount(source: &str, target: &str, kind: &str) -> Result<()> {
        fs::create_dir_all(target)?;
        let [source, path, kind] = [source, target, kind].map(|text| CString::new(text).unwrap_or_default());
        // SAFETY: all strings end with NUL; there are no options.
        match unsafe { libc::mount(source.as_ptr(), path.as_ptr(), kind.as_ptr(), 0, std::ptr::null()) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
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
                let mut got = Vec::new();
                stream.read_to_end(&mut got)?;
                stream.write_all(&(got.len() as u64).to_le_bytes())?;
                stream.write_all(&sum(&got).to_le_bytes())
            }
            b"g" => match stream.write_all(&pattern(64 * MIB)) {
                // The reader may go early.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EPIPE | libc::ECONNRESET)) => Ok(()),
                other => other,
            },
            _ => {
                let mut name = String::new();
                stream.read_to_string(&mut name)?;
                let answer = match test(&name) {
                    Ok(true) => "ok".to_owned(),
                    Ok(false) => "wrong".to_owned(),
                    Err(error) => error.to_string(),
                };
                stream.write_all(answer.as_bytes())
            }
        }
    }

    fn test(name: &str) -> Result<bool> {
        let data = pattern(5 * MIB);
        match name {
            "files" => {
                let right = fs::read("/share/hello")? == data && fs::read("/share/hello")? == data;
                fs::write("/share/written", &data[..MIB])?;
                File::open("/share/written")?.sync_all()?;
                fs::create_dir("/share/directory")?;
                fs::rename("/share/written", "/share/directory/written")?;
                std::os::unix::fs::symlink("directory/written", "/share/link")?;
                let linked = fs::read("/share/link")? == data[..MIB];
                fs::rename("/share/directory/written", "/share/written")?;
                fs::remove_dir("/share/directory")?;
                Ok(right && linked)
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
                let name = CString::new("user.husk")?;
                let path = CString::new("/share/mine")?;
                // SAFETY: all strings end with NUL, the value is as long as said.
                let set = unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), b"value".as_ptr().cast(), 5, 0) };
                println!("xattr: {set}");
                // As another user: the server must act as that user, not as root.
                fs::create_dir("/share/open")?;
                fs::set_permissions("/share/open", fs::Permissions::from_mode(0o1777))?;
                // SAFETY: system calls on this thread only, so that it alone becomes that user.
                unsafe {
                    libc::syscall(libc::SYS_setresgid, 2000, 2000, 2000);
                    libc::syscall(libc::SYS_setresuid, 2000, 2000, 2000);
                }
                fs::write("/share/open/theirs", "y")?;
                let meta = fs::metadata("/share/open/theirs")?;
                let refused = fs::write("/share/mine", "z").is_err();
                Ok(before && refused && (meta.uid(), meta.gid()) == (2000, 2000))
            }
            "locks" => {
                let file = File::create("/share/lock")?;
                file.lock()?;
                Ok(File::open("/share/lock")?.try_lock().is_err())
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
}
