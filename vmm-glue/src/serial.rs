//! The guest's console is a 16550A serial port. The VMM writes the console's output to a pipe, line by line.
//!
//! The pipe never blocks a vCPU. Output that does not fit into the pipe is dropped and counted. The count is written as
//! soon as the pipe accepts output again.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard};

use husk_base::sync::lock;
use husk_base::sys::fd::set_nonblocking;
use serde::{Deserialize, Serialize};
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial, SerialState};
use vmm_sys_util::eventfd::EventFd;

/// First I/O port of COM1.
pub const PORT: u16 = 0x3f8;
/// First port after COM1.
pub const PORT_END: u16 = PORT + 8;
/// Maximum number of bytes in one write. Writes of at most PIPE_BUF to a pipe are atomic (pipe(7)).
const LINE_MAX: usize = 1024;

/// The serial port.
pub struct Console(Mutex<Serial<Irq, NoEvents, LineWriter>>);

impl Console {
    /// Creates a console that writes to `pipe` and raises interrupts through `irq`.
    ///
    /// # Errors
    /// The call fails if the pipe cannot be made non-blocking.
    pub fn new(pipe: OwnedFd, irq: EventFd) -> io::Result<Self> {
        set_nonblocking(&pipe)?;
        let lines = LineWriter { pipe: File::from(pipe), line: Vec::with_capacity(LINE_MAX), dropped: 0 };
        Ok(Self(Mutex::new(Serial::new(Irq(irq), lines))))
    }

    /// Serves a read of a register.
    pub fn read(&self, register: u8) -> u8 {
        self.lock().read(register)
    }

    /// Serves a write to a register.
    pub fn write(&self, register: u8, value: u8) {
        // `LineWriter` never fails. A lost byte or interrupt must not disturb the guest.
        let _ = self.lock().write(register, value);
    }

    /// Returns the registers.
    pub fn state(&self) -> ConsoleState {
        let state = self.lock().state();
        ConsoleState {
            divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupts: [state.interrupt_enable, state.interrupt_identification],
            line: [state.line_control, state.line_status],
            modem: [state.modem_control, state.modem_status],
            scratch: state.scratch,
        }
    }

    /// Sets the registers.
    ///
    /// # Errors
    /// If the interrupt cannot be raised.
    pub fn restore(&self, state: &ConsoleState) -> io::Result<()> {
        let ConsoleState { divisor, interrupts, line, modem, scratch } = *state;
        let state = SerialState {
            baud_divisor_low: divisor[0],
            baud_divisor_high: divisor[1],
            interrupt_enable: interrupts[0],
            interrupt_identification: interrupts[1],
            line_control: line[0],
            line_status: line[1],
            modem_control: modem[0],
            modem_status: modem[1],
            scratch,
            // The console has no input.
            in_buffer: Vec::new(),
        };
        let mut serial = self.lock();
        let irq = Irq(serial.interrupt_evt().0.try_clone()?);
        let lines = serial.writer_mut().take()?;
        *serial =
            Serial::from_state(&state, irq, NoEvents, lines).map_err(|error| io::Error::other(format!("{error:?}")))?;
        Ok(())
    }

    /// Writes buffered output that does not end with a newline yet.
    pub fn flush(&self) {
        self.lock().writer_mut().write_out();
    }

    fn lock(&self) -> MutexGuard<'_, Serial<Irq, NoEvents, LineWriter>> {
        lock(&self.0)
    }
}

/// The registers of the serial port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {
    divisor: [u8; 2],
    interrupts: [u8; 2],
    line: [u8; 2],
    modem: [u8; 2],
    scratch: u8,
}

/// The port's interrupt.
struct Irq(EventFd);

impl Trigger for Irq {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Collects output into lines.
struct LineWriter {
    pipe: File,
    line: Vec<u8>,
    dropped: usize,
}

impl LineWriter {
    /// Moves the buffered output to a new writer of the same pipe.
    fn take(&mut self) -> io::Result<Self> {
        let pipe = self.pipe.try_clone()?;
        Ok(Self { pipe, line: std::mem::take(&mut self.line), dropped: self.dropped })
    }

    /// Writes the buffered bytes to the pipe, or drops them.
    fn write_out(&mut self) {
        if self.line.is_empty() {
            return;
        }
        if self.dropped > 0 {
            let note = format!("[{} bytes of console output dropped]\n", self.dropped);
            if self.pipe.write(note.as_bytes()).is_ok() {
                self.dropped = 0;
            }
        }
        if self.dropped > 0 || self.pipe.write(&self.line).is_err() {
            self.dropped += self.line.len();
        }
        self.line.clear();
    }
}

impl Write for LineWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for &byte in bytes {
            self.line.push(byte);
            if byte == b'\n' || self.line.len() >= LINE_MAX {
                self.write_out();
            }
        }
        Ok(bytes.len())
    }

    /// Does nothing. The serial port calls this function after each byte, but output is written at the end of a line.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn console() -> (Console, io::PipeReader) {
        let (reader, writer) = io::pipe().unwrap();
        (Console::new(writer.into(), EventFd::new(0).unwrap()).unwrap(), reader)
    }

    #[test]
    fn console_writes_complete_lines() {
        let (console, mut reader) = console();
        for byte in b"panic: one\ntwo" {
            console.write(0, *byte);
        }
        let mut buffer = [0; 64];
        let len = reader.read(&mut buffer).unwrap();
        assert_eq!(&buffer[..len], b"panic: one\n");
        console.flush();
        let len = reader.read(&mut buffer).unwrap();
        assert_eq!(&buffer[..len], b"two");
    }

    #[test]
    #[cfg_attr(miri, ignore = "filling a pipe byte by byte takes minutes")]
    fn console_reports_dropped_output_after_the_pipe_was_full() {
        let (console, mut reader) = console();
        for _ in 0..200 {
            for _ in 0..1000 {
                console.write(0, b'x');
            }
            console.write(0, b'\n');
        }
        let mut drained = vec![0; 1 << 20];
        let len = reader.read(&mut drained).unwrap();
        assert!(len < 200 * 1001);
        for byte in b"end\n" {
            console.write(0, *byte);
        }
        drop(console);
        let mut rest = String::new();
        reader.read_to_string(&mut rest).unwrap();
        assert!(rest.ends_with("bytes of console output dropped]\nend\n"), "wrong end of console output: {rest}");
    }
}
