//! `start`: binds the sandbox' socket, leaves a daemon behind that boots its virtual machine, and answers at once.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use super::Args;
use super::bootstrap::{self, Env, MAX_INPUT, Params};
use crate::address::{Address, Listen, ListenError};
use crate::daemon;
use crate::spec::{Spec, SpecError};

/// Why no shim was started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The bundle's configuration.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The socket.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The bundle's directory is not known.
    #[error("finding the working directory")]
    Bundle(#[source] std::io::Error),
    /// Stdin cannot be read.
    #[error("reading the bootstrap parameters")]
    Input(#[source] std::io::Error),
    /// The address file cannot be written.
    #[error("writing {path}")]
    AddressFile {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// No second process.
    #[error("forking the shim's daemon")]
    Fork(#[source] nix::Error),
    /// The answer cannot be written.
    #[error("writing the answer")]
    Reply(#[source] std::io::Error),
    /// A container of a sandbox whose shim is not there.
    #[error("sandbox {0} is not running")]
    NoSandbox(String),
}

/// Starts the sandbox' shim, or finds the one that is there.
///
/// # Errors
/// [`StartError`]; nothing is left behind then.
pub fn start(args: &Args, started_ns: u64) -> Result<(), StartError> {
    let bundle = std::env::current_dir().map_err(StartError::Bundle)?;
    let mut input = Vec::new();
    std::io::stdin().lock().take(MAX_INPUT).read_to_end(&mut input).map_err(StartError::Input)?;
    let params = Params::new(&input, args, &Env::read()).with_bundle(&bundle);
    // A sandbox that the shim is itself comes without a specification: the request that creates it says what it is.
    let spec = match Spec::load(&bundle) {
        Err(SpecError::Read { source, .. })
            if source.kind() == std::io::ErrorKind::NotFound && bootstrap::is_controllers(&bundle) =>
        {
            None
        }
        other => Some(other?),
    };
    let group = spec.as_ref().map_or(Ok(args.id.as_str()), |spec| spec.group(&args.id))?.to_owned();
    let address = Address::new(params.socket_dir.as_deref(), &params.address, &args.namespace, &group);
    let listener = match address.listen()? {
        Listen::Taken => None,
        Listen::Bound(listener) => Some(listener),
    };
    // Later containers of a pod only find their sandbox' shim: a virtual machine is sized by the sandbox' own bundle.
    if listener.is_some() && group != args.id {
        address.remove();
        return Err(StartError::NoSandbox(group));
    }
    write_address(&bundle, &address)?;
    let Some(listener) = listener else { return answer(&address, params.form) };
    adjust_oom_score();
    // SAFETY: this process has one thread, so the child may do anything the parent could.
    match unsafe { nix::unistd::fork() } {
        Ok(nix::unistd::ForkResult::Parent { .. }) => answer(&address, params.form),
        Ok(nix::unistd::ForkResult::Child) => {
            let start = daemon::Start {
                namespace: args.namespace.clone(),
                sandbox: group,
                bundle,
                spec,
                params,
                address,
                listener,
                started_ns,
            };
            // A daemon ends here and nowhere else: it must not return into its parent's code.
            std::process::exit(daemon::run(start));
        }
        Err(error) => {
            address.remove();
            Err(StartError::Fork(error))
        }
    }
}

fn answer(address: &Address, form: bootstrap::Form) -> Result<(), StartError> {
    let mut out = std::io::stdout().lock();
    out.write_all(&bootstrap::reply(&address.uri(), form)).and_then(|()| out.flush()).map_err(StartError::Reply)
}

/// containerd reads the file to find its shims again after a restart: it is there whole or not at all.
fn write_address(bundle: &Path, address: &Address) -> Result<(), StartError> {
    let (path, temporary) = (bundle.join("address"), bundle.join(".address"));
    std::fs::write(&temporary, address.uri())
        .and_then(|()| std::fs::rename(&temporary, &path))
        .map_err(|source| StartError::AddressFile { path, source })
}

/// One more than containerd's, as its own shims do: the kernel takes the shim before it takes containerd.
fn adjust_oom_score() {
    let parent = nix::unistd::getppid();
    let score = std::fs::read_to_string(format!("/proc/{parent}/oom_score_adj"));
    if let Some(score) = score.ok().and_then(|text| text.trim().parse::<i32>().ok()) {
        let _ = std::fs::write("/proc/self/oom_score_adj", (score + 1).min(1000).to_string());
    }
}
