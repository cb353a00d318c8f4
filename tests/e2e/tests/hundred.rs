//! One hundred containers, one after another.
use husk_e2e::case;

#[test]
fn one_hundred_one_after_another() {
    case("hundred", |case| {
        for number in 0..100 {
            case.busybox(&["echo", &format!("container {number}")])
                .output()
                .expect_clean()
                .expect_out(&format!("container {number}"));
        }
    });
}
