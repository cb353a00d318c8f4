//! Saved VMs: Husk's guest is saved when its agent is ready, and restored several times.

use std::process::Command;

use husk_e2e::figures::print_figure;

#[test]
fn agents_of_restored_guests_answer() {
    let [kernel, initrd] = ["vmlinux", "initrd.cpio"].map(|name| format!("/usr/local/share/husk/{name}"));
    let output = Command::new("/husk/saved").args([kernel, initrd]).output().expect("run /husk/saved");
    let (figures, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    print_figure(format_args!("a saved guest:\n{figures}"));
    assert!(output.status.success(), "{}:\n{figures}{errors}", output.status);
}
