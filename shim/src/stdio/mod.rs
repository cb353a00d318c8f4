//! A process' standard streams: containerd's ends (fifos, files, loggers) and their relay to the guest.
//!
//! ```text
//! pub struct Paths { pub stdin: String, pub stdout: String, pub stderr: String, pub terminal: bool }   // as in the request
//! pub struct Owner<'a> { pub id: &'a str, pub namespace: &'a str }          // CONTAINER_ID, CONTAINER_NAMESPACE
//! pub struct Stdio;  // opened host ends
//! impl Stdio {
//!   pub async fn open(paths: &Paths, owner: &Owner<'_>) -> Result<Stdio, StdioError>;   // before Create is passed on
//!   pub fn wants(&self) -> Wants;                                           // which vsock streams to open
//!   pub fn start(self, streams: Streams) -> Result<Relay, StdioError>;      // spawns the copies on the current runtime
//! }
//! pub struct Wants { pub stdin: bool, pub stdout: bool, pub stderr: bool, pub terminal: bool }
//!    // terminal: exactly one stream (its token goes into stdout of the guest's request, and into stdin too)
//! pub enum Streams { Terminal(UnixStream), Pipes { stdin: Option<UnixStream>, stdout: Option<UnixStream>, stderr: Option<UnixStream> } }
//! impl Relay {
//!   pub async fn drain(&self, quiet: Duration);   // returns when out and err are at their end and written, or nothing moved for `quiet`
//!   pub fn close_stdin(&self);                    // CloseIO: EOF once what clients wrote is through
//! }   // dropping it stops every copy and closes the fifos
//! ```
