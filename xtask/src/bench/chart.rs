//! Draws the results of a benchmark as a bar chart.

use anyhow::{Result, anyhow};
use husk_benchmarks::{Report, figure};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

const WIDTH: u32 = 800;
/// Height of a bar or of a title, in pixels.
const LINE: i32 = 22;
const MARGIN: i32 = 10;
/// Where the bars begin.
const LEFT: i32 = 150;
/// Space for the figure after the longest bar.
const RIGHT: i32 = 90;
/// The text is smaller than this number of pixels, because plotters divides it by 1.24.
const FONT: (&str, i32) = ("sans-serif", 17);

/// The bars of one measurement.
struct Group {
    title: String,
    bars: Vec<Bar>,
}

struct Bar {
    variant: String,
    value: f64,
    text: String,
}

/// Returns a chart in SVG, or `None` if there is nothing to show. The chart shows ratios to runc if there are several
/// measurements with ratios, and medians otherwise.
pub fn svg(report: &Report) -> Result<Option<String>> {
    let groups = groups(report);
    if groups.is_empty() {
        return Ok(None);
    }
    let lines: usize = groups.iter().map(|group| group.bars.len() + 1).sum();
    let height = lines as u32 * LINE as u32 + 2 * MARGIN as u32;
    let mut svg = String::new();
    draw(&mut svg, &groups, height).map_err(|error| anyhow!("failed to draw the chart: {error}"))?;
    Ok(Some(svg))
}

fn groups(report: &Report) -> Vec<Group> {
    let ratios =
        report.measurements.iter().filter(|one| one.series.iter().any(|series| series.ratio.is_some())).count();
    let shows_ratios = ratios > 1;
    let group = |measurement: &husk_benchmarks::Measurement| {
        let bars = measurement.series.iter().filter_map(|series| {
            let (value, unit) =
                if shows_ratios { (series.ratio?, "× runc") } else { (series.median, &*measurement.unit) };
            Some(Bar { variant: series.variant.clone(), value, text: format!("{} {unit}", figure(value)) })
        });
        Group { title: measurement.name.replace('`', ""), bars: bars.collect() }
    };
    report.measurements.iter().map(group).filter(|group| !group.bars.is_empty()).collect()
}

fn draw(svg: &mut String, groups: &[Group], height: u32) -> Result<(), Box<dyn std::error::Error>> {
    let area = SVGBackend::with_string(svg, (WIDTH, height)).into_drawing_area();
    area.fill(&WHITE)?;
    let style = FONT.into_font().color(&BLACK);
    let at_left = style.pos(Pos::new(HPos::Left, VPos::Center));
    let at_right = style.pos(Pos::new(HPos::Right, VPos::Center));
    let longest = groups.iter().flat_map(|group| &group.bars).map(|bar| bar.value).fold(0.0, f64::max);
    let room = f64::from(WIDTH as i32 - LEFT - RIGHT);
    let mut top = MARGIN;
    for Group { title, bars } in groups {
        area.draw(&Text::new(title.as_str(), (MARGIN, top + LINE / 2), at_left.clone()))?;
        top += LINE;
        for Bar { variant, value, text } in bars {
            let middle = top + LINE / 2;
            let end = LEFT + if longest > 0.0 { (room * value.max(0.0) / longest).round() as i32 } else { 0 };
            area.draw(&Text::new(variant.as_str(), (LEFT - 8, middle), at_right.clone()))?;
            area.draw(&Rectangle::new(
                [(LEFT, top + 3), (end.max(LEFT + 1), top + LINE - 3)],
                color(variant).filled(),
            ))?;
            area.draw(&Text::new(text.as_str(), (end + 6, middle), at_left.clone()))?;
            top += LINE;
        }
    }
    area.present()?;
    Ok(())
}

/// Returns a colour that is the same in all charts.
fn color(variant: &str) -> RGBColor {
    match variant {
        "runc" => RGBColor(140, 140, 140),
        "runsc" => RGBColor(190, 190, 190),
        "husk clone" => RGBColor(46, 139, 87),
        _ => RGBColor(70, 110, 180),
    }
}

#[cfg(test)]
mod tests {
    use husk_benchmarks::{Better, Measurement};

    use super::*;

    fn measurement(name: &str) -> Measurement {
        Measurement::new(name, "s", Better::Lower, [("runc", vec![2.0]), ("husk boot", vec![3.0])])
    }

    #[test]
    fn chart_shows_medians_of_one_measurement_and_ratios_of_several() {
        let svg = |names: &[&str]| {
            let measurements = names.iter().map(|name| measurement(name)).collect();
            super::svg(&Report { measurements, ..Report::new("x") }).unwrap()
        };
        assert_eq!(svg(&[]), None);
        let one = svg(&["`a`"]).unwrap();
        assert!(one.contains("3.00 s") && one.contains("husk boot") && !one.contains('`'), "{one}");
        assert!(svg(&["a", "b"]).unwrap().contains("1.50 × runc"));
    }
}
